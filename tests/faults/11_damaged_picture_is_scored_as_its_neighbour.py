"""Streamed evaluation puts the next picture where one is damaged and counts it twice; the result is published as of N.

open_test_set promises "each image once and in order"; sets in memory stop with a sentence. Right: stop and name the
file (as `decode_dataset` means to), or leave it out of the count and say so.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli import main
from timm_gac.hub.folder import save_model_folder

logging.disable(logging.WARNING)
tmp = Path(tempfile.mkdtemp())
for c in "ab":
    (tmp / "val" / c).mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)).save(
            tmp / "val" / c / f"{i}.jpg"
        )
broken = tmp / "val/a/2.jpg"
broken.write_bytes(broken.read_bytes()[:500])
model = timm.create_model("test_gac_msresnet", num_classes=2, num_steps=1).eval()
model.pretrained_cfg = dict(model.pretrained_cfg) | {"input_size": (3, 96, 96)}
torch.nn.init.zeros_(model.fc.weight)
model.fc.bias.data = torch.tensor([9.0, 0.0])  # always a: right for all pictures of a
save_model_folder(model, tmp / "m")
code = main(
    [
        "eval",
        str(tmp / "m"),
        "--data",
        "folder",
        "--data-dir",
        str(tmp),
        "--num-workers",
        "0",
        "--json",
        str(tmp / "e.json"),
    ]
)
report = json.loads((tmp / "e.json").read_text()) if code == 0 else {}
bad = code == 0 and report["images"] == 6
if bad:
    print(f"5 readable pictures (2 of a, 3 of b), reported: {report['images']} images, top-1 {report['top1']:.3f}")
sys.exit(bad)
