"""Where the cache folder cannot be written (containers without a home), no folder of small pictures can be used at all.

Right: decode without keeping it and warn, as the cache is a convenience; or offer the option that the message names.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli import main
from timm_gac.hub.folder import save_model_folder

os.environ["XDG_CACHE_HOME"] = "/proc/no-such-place"  # nobody can write there
tmp = Path(tempfile.mkdtemp())
for c in "ab":
    (tmp / "val" / c).mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp / "val" / c / "x.png")
save_model_folder(timm.create_model("test_gac_msresnet", num_classes=2, num_steps=1), tmp / "m")
code = main(["eval", str(tmp / "m"), "--data", "folder", "--data-dir", str(tmp)])
sys.exit(code != 0)
