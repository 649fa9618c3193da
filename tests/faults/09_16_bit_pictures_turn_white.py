"""Grey pictures of 16 bits (and 32-bit or float ones) are read as white or black: Pillow's convert() clips them.

Microscopes, X-rays and depth cameras write such PNG and TIFF files. Right: they are scaled (16 bit: divided by 257) so
that the picture is that of its 8-bit copy, or are refused with a sentence; in predict and in data sets alike.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli.sources import open_pictures
from timm_gac.data import load_arrays

tmp, bad = Path(tempfile.mkdtemp()), []
ramp = np.linspace(0, 255, 32)[None].repeat(32, 0)
for split in ("train", "val"):
    for c in ("a", "b"):
        (tmp / split / c).mkdir(parents=True)
Image.fromarray(ramp.astype(np.uint8)).save(tmp / "8.png")
Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp / "16.png")
Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp / "16.tif")
Image.open(tmp / "8.png").save(tmp / "train/a/x.png")
(tmp / "train/b/x.png").write_bytes((tmp / "16.png").read_bytes())
model = timm.create_model("test_gac_msresnet")
want = open_pictures([tmp / "8.png"], model)
for name in ("16.png", "16.tif"):
    try:
        got = open_pictures([tmp / name], model)
        if (got - want).abs().max() > 0.05:
            bad.append(f"predict reads {name} with mean {got.mean():.2f} instead of {want.mean():.2f} (normalised)")
    except ValueError:
        pass
try:
    images = load_arrays("folder", "train", data_dir=str(tmp)).images.float().mean((1, 2, 3)).tolist()
    if abs(images[0] - images[1]) > 3:
        bad.append(
            f"a data set's folder: mean grey of the 8-bit picture {images[0]:.0f}, of its 16-bit copy {images[1]:.0f}"
        )
except ValueError:
    pass
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
