"""`timm-gac predict` turns a picture upright by its EXIF tag; training and evaluation on the same file do not.

Phone photos are therefore trained and scored lying on their side and predicted standing. Right: the same file gives the
same network input everywhere (test_a_folder_of_large_pictures_is_streamed_as_predict_prepares_them, with an EXIF tag).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli.sources import open_pictures
from timm_gac.data import open_test_set

bad = []
for way, side in (("in memory", 32), ("streamed", 96)):
    tmp = Path(tempfile.mkdtemp())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[: side // 2] = 255
    for c in "ab":
        (tmp / "val" / c).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp / "val" / c / "x.jpg", exif=exif, quality=95)
    model = timm.create_model("test_gac_msresnet", num_classes=2)
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"input_size": (3, side, side)}
    loader = open_test_set("folder", model.pretrained_cfg, num_classes=2, data_dir=str(tmp), batch_size=2)
    scored = next(iter(loader.batches(0)))[0][0]
    predicted = open_pictures([tmp / "val/a/x.jpg"], model)[0]
    if (scored - predicted).abs().max() > 0.1:
        bad.append(
            f"{way}: eval and predict see the same file differently, by up to {(scored - predicted).abs().max():.1f}"
        )
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
