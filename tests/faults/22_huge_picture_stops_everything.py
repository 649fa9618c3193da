"""A picture above Pillow's pixel limit ends `predict` with a traceback; pictures after it are not answered.

DecompressionBombError is no OSError. Decoding a training folder ends in the same traceback, without a file name.
Right: one sentence that names the file, status 1, and the other pictures still run ("a bad file is one sentence").
"""

import json
import sys
import tempfile
from pathlib import Path

import timm
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli import main
from timm_gac.data import load_arrays
from timm_gac.hub.folder import save_model_folder

tmp, bad = Path(tempfile.mkdtemp()), []
save_model_folder(timm.create_model("test_gac_msresnet", num_classes=2, num_steps=1), tmp / "m")
Image.MAX_IMAGE_PIXELS = 1000  # so that a small file does; 178,956,970 by default, twice this number is the limit
Image.new("1", (64, 64)).save(tmp / "huge.png")
Image.new("1", (20, 20)).save(tmp / "small.png")
try:
    code = main(
        [
            "predict",
            str(tmp / "huge.png"),
            str(tmp / "small.png"),
            "--model",
            str(tmp / "m"),
            "--json",
            str(tmp / "p.json"),
        ]
    )
    answered = json.loads((tmp / "p.json").read_text())["pictures"]
    if code != 1 or len(answered) != 1:
        bad.append(f"predict: status {code}, {len(answered)} pictures answered")
except Exception as error:
    bad.append(f"predict: {type(error).__name__}: {error}")
for c in "ab":
    (tmp / "train" / c).mkdir(parents=True)
    Image.new("1", (64, 64)).save(tmp / "train" / c / "huge.png")
try:
    load_arrays("folder", "train", data_dir=str(tmp), image_size=8)
except ValueError:
    pass
except Exception as error:
    bad.append(f"load_arrays: {type(error).__name__}: {error}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
