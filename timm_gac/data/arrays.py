"""Small images as one array: from an .npz file, from scikit-learn's digits, or decoded once from a timm data set."""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..runtime.files import replace_file
from ..runtime.terminal import plain
from .dataset import open_dataset
from .decode import decode_dataset, fingerprint
from .labels import match_labels
from .pictures import create_picture_transform, join_names

Split = Literal["train", "test"]
DECODER = 2  # part of a cache file's name: raised when the same files are decoded to other pixels
_DAMAGE = (
    *(ValueError, OSError, EOFError, LookupError, TypeError, RuntimeError, SyntaxError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageArrays:
    """A set of labelled images of one size.

    Args:
        images: uint8 (N, C, H, W), on the CPU.
        labels: int64 (N,), from 0.
        label_names: Of the classes, in order; empty where unknown.

    Raises:
        ValueError: A dtype or shape is another, the set is empty, a label is negative or has no name.
    """

    images: Tensor
    labels: Tensor
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"expected images as uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}: "
                "store grey values 0 to 255, channels before height"
            )
        if self.images.shape[1] not in (1, 2, 3, 4):
            raise ValueError(
                f"expected 1 to 4 channels in axis 1, got shape {tuple(self.images.shape)}: "
                "transpose (N, H, W, C) to (N, C, H, W)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"expected int64 labels of shape ({len(self.images)},), got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}: give one integer per image"
            )
        if self.images.numel() == 0:
            raise ValueError("expected at least one image, got an empty set: check the path and the split")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or (self.label_names and high >= len(self.label_names)):
            raise ValueError(
                f"expected labels from 0 to {len(self.label_names) - 1 if self.label_names else 'any'}, "
                f"got {low} to {high}: every image needs a class"
            )

    @property
    def num_classes(self) -> int:
        """As many as there are names, or as the highest label asks for."""
        return len(self.label_names) or int(self.labels.max()) + 1


def load_arrays(
    data: str,
    split: Split,
    *,
    data_dir: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    channels: int = 3,
    label_names: Sequence[str] = (),
    strict: bool = False,
    cache: bool = False,
    num_workers: int = 0,
    progress: bool = False,
) -> ImageArrays:
    """Read a split of a set of small images.

    Args:
        data: Path of an .npz with x_train, y_train, x_test, y_test (uint8 (N, C, H, W), integers (N,)) and perhaps
            label_names; or ``digits`` of scikit-learn, every fifth of which is the test set; or any name that
            `timm.data.create_dataset` takes and that can be indexed: ``folder``, ``torch/cifar100``, ``hfds/cifar100``.
        split: ``train``, or ``test``, which finds val, validation and the like too.
        data_dir: Folder of the data set, for timm's names.
        image_size: Side, or height and width, in pixels. Other images are resized until they cover it, and the centre
            is kept. None: as they are.
        preprocessing: A ``pretrained_cfg``, by whose crop and interpolation pictures of a data set are resized. None:
            the whole shorter side is kept (crop_pct 1), bicubic. Arrays are always resized so.
        channels: 3 decodes pictures as RGB, 1 as grey.
        label_names: Classes of a network, or of the training set: labels are matched to them by name, see
            `match_labels`. Empty: the data set's own.
        strict: Refuse classes that can only be matched in order.
        cache: Keep what was decoded in the user's cache folder and take it from there until the files change. Where
            it cannot be written or is damaged, a warning says so, and the pictures are decoded.
        num_workers: Processes that decode.
        progress: Show how far decoding is.

    Raises:
        ValueError: The file or folder is not there or holds something else, a picture cannot be read, images differ in
            size, or a class is not among ``label_names``.
    """
    if split not in ("train", "test"):
        raise ValueError(f"expected split train or test, got {split!r}: choose one")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise ValueError(f"expected an image_size of at least 1 pixel, got {image_size}: leave it out or raise it")
    if data.endswith(".npz") or data == "digits":
        if data_dir:
            raise ValueError(f"expected no data_dir for {data!r}, which needs none, got {data_dir!r}: leave it out")
        arrays = _resized(_load_npz(Path(data), split) if data != "digits" else _load_digits(split), size)
    else:
        dataset = open_dataset(data, split, data_dir, channels=channels)
        crop = resolve_data_config(pretrained_cfg={"crop_pct": 1.0, **(preprocessing or {})})
        crop = {name: crop[name] for name in ("crop_pct", "crop_mode", "interpolation", "mean")}
        crop["input_size"] = (channels, *(size or (0, 0)))
        dataset.transform = pil_to_tensor if size is None else create_picture_transform(crop, as_float=False)
        file = _cache_file(data, split, crop, fingerprint(dataset, data, data_dir)) if cache else None
        kept = _load_cache(file) if file else None
        if kept is None:
            images, labels = decode_dataset(dataset, num_workers, progress)
            kept = ImageArrays(images, labels, dataset.label_names)
            if file:
                _save_cache(file, kept)
        arrays = kept
    return _with_labels(arrays, label_names, repr(f"{data} in {data_dir}" if data_dir else data), strict)


def _with_labels(arrays: ImageArrays, label_names: Sequence[str], data: str, strict: bool) -> ImageArrays:
    labels = match_labels(arrays.label_names, label_names, data, strict=strict)
    if labels is None:
        return arrays
    return replace(arrays, labels=torch.tensor(labels)[arrays.labels], label_names=tuple(label_names))


def split_arrays(arrays: ImageArrays, share: float, seed: int = 0) -> tuple[ImageArrays, ImageArrays]:
    """Set a part of each class aside.

    Args:
        arrays: The set.
        share: Of each class, rounded to whole images, but at least one of a class with two images or more.
        seed: Of the draw.

    Returns:
        What is left and what was set aside, each in the order of the set.

    Raises:
        ValueError: Nothing would be set aside, or a class would be empty.
    """
    rng, aside = np.random.default_rng(seed), np.zeros(len(arrays.labels), bool)
    labels = arrays.labels.numpy()
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        count = max(round(share * len(places)), 1)
        if len(places) <= count or share <= 0:
            raise ValueError(
                f"expected a share above 0 that leaves images of each class, got {share} of the {len(places)} of class "
                f"{label}: give more images or another share"
            )
        aside[rng.permutation(places)[:count]] = True
    parts = [torch.from_numpy(np.flatnonzero(chosen)) for chosen in (~aside, aside)]
    names = arrays.label_names
    left, kept = (ImageArrays(arrays.images[part], arrays.labels[part], names) for part in parts)
    return left, kept


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz whole or not at all.

    Raises:
        OSError: The folder cannot be written, or the disk is full; a file of that name is as it was.
    """
    try:
        with replace_file(file) as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # a stub's keyword allow_pickle takes them all
    except OSError as error:
        raise OSError(f"cannot write {file}: {error}; free space there, or go without the cache") from error


def _open_npz(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"expected an .npz file at {file}, got no such file: check the path")
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("a single array")
        return archive
    except _DAMAGE as error:
        raise ValueError(f"expected a whole .npz file at {file}, got {_reason(error)}: make it anew") from error


def _read(archive: Any, file: Path, keys: tuple[str, ...]) -> list[np.ndarray]:
    missing = [key for key in keys if key not in archive]
    if missing:
        raise ValueError(
            f"expected {', '.join(keys)} in {file}, got {join_names(list(archive))}: add {', '.join(missing)}"
        )
    try:
        return [archive[key] for key in keys]
    except _DAMAGE as error:
        raise ValueError(f"expected whole arrays in {file}, got {_reason(error)}: make it anew") from error


def _reason(error: BaseException) -> str:
    return plain(error)[:200] or type(error).__name__


def _names(values: np.ndarray, source: str) -> tuple[str, ...]:
    if values.ndim != 1 or values.dtype.kind not in "US":
        raise ValueError(
            f"expected label_names in {source} as one row of texts, got {values.dtype} {values.shape}: "
            "store np.array(names)"
        )
    return tuple(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values)


def _labels(values: np.ndarray, source: str) -> Tensor:
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"expected integer labels in {source}, got {values.dtype}: number the classes from 0")
    return torch.from_numpy(values.astype(np.int64))


def _images(values: np.ndarray, source: str) -> Tensor:
    if values.dtype != np.uint8:
        raise ValueError(f"expected uint8 images in {source}, got {values.dtype}: store grey values 0 to 255")
    return torch.from_numpy(np.ascontiguousarray(values))


def _load_npz(file: Path, split: Split) -> ImageArrays:
    with _open_npz(file) as archive:
        images, labels = _read(archive, file, (f"x_{split}", f"y_{split}"))
        names: tuple[str, ...] = ()
        if "label_names" in archive:
            names = _names(_read(archive, file, ("label_names",))[0], str(file))
    return ImageArrays(_images(images, f"{file}, x_{split}"), _labels(labels, f"{file}, y_{split}"), names)


def _load_digits(split: Split) -> ImageArrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("expected scikit-learn for the data 'digits', got none: pip install scikit-learn") from error
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
    images = np.round(digits.images[chosen, None] * (255 / 16)).astype(np.uint8)
    return ImageArrays(torch.from_numpy(images), _labels(digits.target[chosen], "digits"), tuple("0123456789"))


def _resized(arrays: ImageArrays, size: tuple[int, int] | None) -> ImageArrays:
    shape = tuple(arrays.images.shape[2:])
    if size is None or shape == size:
        return arrays
    scale = max(wanted / side for wanted, side in zip(size, shape, strict=True))
    covering = [max(wanted, round(side * scale)) for wanted, side in zip(size, shape, strict=True)]
    top, left = ((side - wanted) // 2 for side, wanted in zip(covering, size, strict=True))
    parts = [
        F.interpolate(part.float(), size=covering, mode="bicubic", antialias=True).round_().clamp_(0, 255).byte()
        for part in arrays.images.split(1024)
    ]
    images = torch.cat([part[:, :, top : top + size[0], left : left + size[1]] for part in parts])
    return ImageArrays(images.contiguous(), arrays.labels, arrays.label_names)


def _cache_file(data: str, split: str, crop: dict[str, Any], source: str) -> Path | None:
    """Where a decoded set is kept; None where the user has no folder for caches."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm_gac" / "arrays"
    except RuntimeError:  # there is no home
        _logger.warning("decoded pictures are not kept: expected a home folder, got none; set XDG_CACHE_HOME")
        return None
    key = hashlib.sha256(repr((DECODER, data, split, sorted(crop.items()), source)).encode()).hexdigest()[:16]
    side = "x".join(map(str, crop["input_size"][1:])) if crop["input_size"][1] else "as-is"
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', data)}-{split}-{side}-{key}.npz"


def _load_cache(file: Path) -> ImageArrays | None:
    """What was kept; None where there is nothing, or it is damaged."""
    try:
        if not file.is_file():
            return None
        with _open_npz(file) as archive:
            images, labels, names = _read(archive, file, ("images", "labels", "label_names"))
        return ImageArrays(_images(images, str(file)), _labels(labels, str(file)), _names(names, str(file)))
    except (ValueError, OSError) as error:
        _logger.warning("decoding anew: %s", error)
        return None


def _save_cache(file: Path, arrays: ImageArrays) -> None:
    content = {"images": arrays.images.numpy(), "labels": arrays.labels.numpy()}
    try:
        save_arrays(file, content | {"label_names": np.array(arrays.label_names, str)})
    except OSError as error:
        _logger.warning("decoded pictures are not kept: %s", error)
