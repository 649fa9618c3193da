"""Picture files: which a folder holds, and how each is decoded, for training, evaluation and all commands alike."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..runtime.terminal import plain

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# A picture of 1 x 60,000 pixels, resized to 224 pixels on its shorter side, would have 9 GB.
MAX_ASPECT = 256
# How a picture of this EXIF orientation is put upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)


class PictureError(ValueError):
    """A picture that cannot be used; the message names it.

    A `DataLoader` raises a worker's error anew, with the worker's traceback in the message: only the sentence is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("PictureError: ")[2].rstrip())


def find_pictures(folder: str | Path) -> list[str]:
    """Paths of the regular files with a picture's suffix in a folder and below, sorted; hidden ones are left out.

    Links to folders are followed, each folder once and none that holds ``folder`` itself.

    Raises:
        OSError: A folder cannot be read.
    """
    seen = {str(parent) for parent in Path(folder).resolve().parents}
    return sorted(_walk(str(folder), seen))


def holds_picture(folder: Path) -> bool:
    """Whether `find_pictures` would find one in a folder that is not hidden."""
    seen = {str(parent) for parent in folder.resolve().parents}
    return not folder.name.startswith(".") and next(_walk(str(folder), seen), None) is not None


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    # Strings and `os.scandir`, which needs no system call a file: ImageNet has 1.3 million.
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, seen)
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield entry.path


def read_picture(source: Path | str | BinaryIO | Image.Image, channels: int = 3, name: str = "") -> Image.Image:
    """Decode a picture and put it upright, as its EXIF tag says.

    Grey pictures of 16 bits are scaled to 8 (divided by 257), which Pillow's own conversion would clip. An alpha
    channel is dropped, as timm does.

    Args:
        source: A file, a stream, or what another package has decoded.
        channels: 3 for RGB, 1 for grey.
        name: What it is called in an error; the file where left out.

    Raises:
        PictureError: It is not there, no regular file, damaged, above Pillow's limit of pixels, more than 256 times as
            long as wide, or of 32 bits or floating point, whose range is not known.
    """
    name = name or str(source)
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        state = "is no regular file" if Path(source).exists() else "is not there"
        raise PictureError(f"expected a picture, got {_short(name)}, which {state}: check the path")
    try:
        if isinstance(source, Image.Image):
            return _converted(source, "L" if channels == 1 else "RGB")
        with Image.open(source) as picture:
            return _converted(picture, "L" if channels == 1 else "RGB")
    except _DAMAGE as error:
        reason = plain(error)[:200] or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no known format"  # the message is the path again
        raise PictureError(
            f"expected a picture, got {_short(name)}, which cannot be read as one: {reason}; repair or remove it"
        ) from error


def create_picture_transform(cfg: Mapping[str, Any], *, as_float: bool = True) -> Any:
    """The one way from a decoded picture to a network's input: timm's resize and crop for evaluation.

    Args:
        cfg: A network's ``pretrained_cfg``: input size, mean, std, crop and interpolation.
        as_float: Give normalised float32; else grey values, uint8.

    Returns:
        A function from a PIL image to a tensor (C, H, W).
    """
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=dict(cfg))
    return create_transform(**config, is_training=False, use_prefetcher=not as_float)


def join_names(names: Sequence[object], limit: int = 5) -> str:
    """A few names for an error, and how many more there are."""
    shown = ", ".join(plain(name)[:40] for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def _short(name: str) -> str:
    return repr(plain(name) if len(name) <= 160 else f"...{plain(name)[-157:]}")


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels, more than {MAX_ASPECT} times as long as wide")
    picture.load()  # before its EXIF tag is read: a TIFF is put upright as it is loaded
    turn = _UPRIGHT.get(_orientation(picture))
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        kind = "32-bit" if picture.mode == "I" else "floating-point"
        raise ValueError(f"{kind} values of unknown range: convert it to 8 or 16 bits a channel")
    picture = picture.convert(mode)
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where the tag is missing or damaged."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:
        return 1
