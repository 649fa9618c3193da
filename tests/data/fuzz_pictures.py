"""Pictures of odd kinds, damaged ones and huge ones: each is read in the same way everywhere, or refused by name.

Run by hand for many: ``python tests/data/fuzz_pictures.py 200``; the tests run a short part. Each case is one file. It
must give the same network input in `predict` and in a data set (in memory and streamed), or be refused by both with one
sentence of under 500 characters that names it. A picture whose pixels are known must also come out as they are.
"""

from __future__ import annotations

import collections
import io
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli.sources import open_pictures
from timm_gac.data import load_arrays, open_test_set
from timm_gac.data.pictures import SUFFIXES, PictureError

Made = tuple[bytes, str, "np.ndarray | None"]  # content, suffix, RGB pixels (H, W, 3) where they are known

SIDE = 16


def encoded(picture: Image.Image, suffix: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()), **options)
    return stream.getvalue()


def colours(rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    return rng.integers(256, size=(side, side, 3), dtype=np.uint8)


def lossless(rng: np.random.Generator) -> str:
    return str(rng.choice([".png", ".bmp", ".tif"]))


def plain(rng: np.random.Generator) -> Made:
    pixels, suffix = colours(rng), lossless(rng)
    return encoded(Image.fromarray(pixels), suffix), suffix, pixels


def lossy(rng: np.random.Generator) -> Made:
    suffix = str(rng.choice([".jpg", ".webp"]))
    return encoded(Image.fromarray(colours(rng)), suffix), suffix, None


def grey(rng: np.random.Generator) -> Made:
    pixels, suffix = colours(rng)[..., 0], lossless(rng)
    return encoded(Image.fromarray(pixels), suffix), suffix, np.stack([pixels] * 3, 2)


def sixteen_bits(rng: np.random.Generator) -> Made:
    pixels, suffix = colours(rng)[..., 0], str(rng.choice([".png", ".tif"]))
    picture = Image.fromarray(pixels.astype(np.uint16) * 257)
    return encoded(picture, suffix), suffix, np.stack([pixels] * 3, 2)


def palette(rng: np.random.Generator) -> Made:
    picture = Image.fromarray(colours(rng)).quantize(int(rng.integers(2, 256)))
    options = {"transparency": 0} if rng.random() < 0.5 else {}
    return encoded(picture, ".png", **options), ".png", np.asarray(picture.convert("RGB"))


def alpha(rng: np.random.Generator) -> Made:
    pixels = colours(rng)
    opacity = rng.integers(256, size=(SIDE, SIDE, 1), dtype=np.uint8)
    return encoded(Image.fromarray(np.concatenate([pixels, opacity], 2)), ".png"), ".png", pixels


def odd_mode(rng: np.random.Generator) -> Made:
    mode = str(rng.choice(["1", "LA", "CMYK", "YCbCr", "I", "F", "LAB"]))
    suffix = ".png" if mode in ("1", "LA") else ".tif"
    if mode in ("I", "F"):
        values = rng.normal(0, 1e5, (SIDE, SIDE)).astype(np.int32 if mode == "I" else np.float32)
        return encoded(Image.fromarray(values), suffix), suffix, None
    if mode == "LAB":
        return encoded(Image.frombytes("LAB", (SIDE, SIDE), colours(rng).tobytes()), suffix), suffix, None
    return encoded(Image.fromarray(colours(rng)).convert(mode), suffix), suffix, None


def turned(rng: np.random.Generator) -> Made:
    tag, pixels = int(rng.integers(1, 9)), colours(rng)
    exif = Image.Exif()
    exif[0x0112] = tag
    # The rows that the picture is to have, from the definition of the tag.
    upright = pixels.transpose(1, 0, 2) if tag >= 5 else pixels
    upright = upright[::-1] if tag in (3, 4, 7, 8) else upright
    upright = upright[:, ::-1] if tag in (2, 3, 6, 7) else upright
    suffix = str(rng.choice([".png", ".tif"]))
    return encoded(Image.fromarray(pixels), suffix, exif=exif), suffix, upright


def bad_tag(rng: np.random.Generator) -> Made:
    junk = b"Exif\0\0" + rng.integers(256, size=int(rng.integers(1, 80)), dtype=np.uint8).tobytes()
    return encoded(Image.fromarray(colours(rng)), ".jpg", exif=junk), ".jpg", None


def cut(rng: np.random.Generator) -> Made:
    content, suffix, _ = (plain, lossy, palette, turned)[int(rng.integers(4))](rng)
    return content[: int(rng.integers(len(content)))], suffix, None


def flipped(rng: np.random.Generator) -> Made:
    content, suffix, _ = (plain, lossy, palette, sixteen_bits, turned)[int(rng.integers(5))](rng)
    damaged = bytearray(content)
    for place in rng.integers(len(damaged), size=int(rng.integers(1, 20))):
        damaged[place] = int(rng.integers(256))
    return bytes(damaged), suffix, None


def no_picture(rng: np.random.Generator) -> Made:
    content = rng.integers(256, size=int(rng.integers(200)), dtype=np.uint8).tobytes()
    return content, str(rng.choice(SUFFIXES)), None


def other_suffix(rng: np.random.Generator) -> Made:
    content, _, pixels = plain(rng)
    return content, str(rng.choice(SUFFIXES)), pixels


def png(width: int, height: int) -> bytes:
    """A PNG of one bit that says it is so large, of few bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((width // 8 + 1) * height, 2**20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge(rng: np.random.Generator) -> Made:
    side = int(rng.integers(20_000, 2**31 - 1))
    return png(side, side), ".png", None


def long(rng: np.random.Generator) -> Made:
    length = int(rng.integers(257, 60_000))
    return (png(1, length) if rng.random() < 0.5 else png(length, 1)), ".png", None


KINDS: tuple[Callable[[np.random.Generator], Made], ...] = (
    *(plain, lossy, grey, sixteen_bits, palette, alpha, odd_mode, turned, bad_tag),
    *(cut, flipped, no_picture, other_suffix, huge, long),
)


def refusal(read: Callable[[], torch.Tensor], name: str) -> torch.Tensor | str:
    """What is read; or the sentence of the refusal, which is checked.

    Raises:
        AssertionError: The refusal is no sentence that names the file.
    """
    try:
        return read()
    except PictureError as error:
        text = str(error)
    assert len(text) < 500 and "\n" not in text and name in text and text.startswith("expected"), text
    return text


def check(made: Made, folder: Path, model: Any) -> str:
    """Read a picture in every way; ``read`` or ``refused``.

    Raises:
        AssertionError: Two ways differ, or the pixels are not the known ones.
    """
    content, suffix, pixels = made
    file = folder / "val" / "a" / f"x{suffix}"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    options: dict[str, Any] = {"num_classes": None, "data_dir": str(folder), "batch_size": 1}
    cfg = model.pretrained_cfg

    def scored(side: int) -> torch.Tensor:
        cfg_of_side = dict(cfg) | {"input_size": (3, side, side)}
        return next(iter(open_test_set("folder", cfg_of_side, **options).batches(0)))[0]

    def shown(side: int) -> torch.Tensor:
        model.pretrained_cfg = dict(cfg) | {"input_size": (3, side, side)}
        try:
            return open_pictures([file], model)
        finally:
            model.pretrained_cfg = cfg

    results = []
    for side in (SIDE, 96):  # in memory, streamed
        one, other = (refusal(partial(read, side), file.name) for read in (scored, shown))
        assert isinstance(one, str) == isinstance(other, str), (one, other)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        results.append(isinstance(one, str))
    assert results[0] == results[1]
    if pixels is not None:
        assert not results[0], one
        images = load_arrays("folder", "test", data_dir=str(folder)).images
        np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), pixels)
    return "refused" if results[0] else "read"


def fuzz(count: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Check so many pictures, kind after kind; how often each kind was read and refused, and the failures."""
    model = timm.create_model("test_gac_msresnet")
    counts, failures = collections.Counter[str](), list[str]()
    for case in range(count):
        kind = KINDS[case % len(KINDS)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts[f"{kind.__name__} {check(kind(np.random.default_rng([seed, case])), Path(folder), model)}"] += 1
            except Exception as error:
                failures.append(f"case {case}, {kind.__name__}: {type(error).__name__}: {error}")
    return counts, failures


if __name__ == "__main__":
    found, failed = fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 200, seed=0)
    for name, number in sorted(found.items()):
        sys.stdout.write(f"{number:5} {name}\n")
    sys.stdout.write("\n".join([*failed, f"{sum(found.values())} cases as they should be, {len(failed)} failures\n"]))
    sys.exit(bool(failed))
