"""Small images as one array: from an .npz file, from scikit-learn's digits, or decoded once from a timm data set."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.files import replace_file
from .decode import decode_dataset, fingerprint, open_dataset

__all__ = ["ImageArrays", "Split", "load_arrays", "save_arrays"]

Split = Literal["train", "test"]


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
    image_size: int | None = None,
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
        image_size: Side in pixels. Others are resized: the shorter side, and the centre kept. None: as they are.
        cache: Keep what was decoded in the user's cache folder and take it from there until the files change.
        num_workers: Processes that decode.
        progress: Show a bar while decoding.

    Raises:
        ValueError: The file or folder is not there or holds something else, or images differ in size.
        OSError: The cache cannot be written.
    """
    if split not in ("train", "test"):
        raise ValueError(f"expected split train or test, got {split!r}: choose one")
    if image_size is not None and image_size < 1:
        raise ValueError(f"expected an image_size of at least 1 pixel, got {image_size}: leave it out or raise it")
    if data.endswith(".npz"):
        return _resized(_load_npz(Path(data), split), image_size)
    if data == "digits":
        return _resized(_load_digits(split), image_size)
    dataset = open_dataset(data, split, data_dir)
    file = _cache_file(data, split, image_size, fingerprint(dataset, data, data_dir))
    if cache and file.is_file():
        return _load_cache(file)
    images, labels, names = decode_dataset(dataset, image_size, num_workers, progress)
    arrays = ImageArrays(images, labels, names)
    if cache:
        save_arrays(file, {"images": images.numpy(), "labels": labels.numpy(), "label_names": np.array(names, str)})
    return arrays


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
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected a whole .npz file at {file}, got {error}: make it anew") from error


def _read(archive: Any, file: Path, keys: tuple[str, ...]) -> list[np.ndarray]:
    missing = [key for key in keys if key not in archive]
    if missing:
        raise ValueError(f"expected {', '.join(keys)} in {file}, got {', '.join(archive)}: add {', '.join(missing)}")
    try:
        return [archive[key] for key in keys]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected whole arrays in {file}, got {error}: make it anew") from error


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
        names = tuple(map(str, archive["label_names"])) if "label_names" in archive else ()
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


def _resized(arrays: ImageArrays, image_size: int | None) -> ImageArrays:
    height, width = arrays.images.shape[2:]
    if image_size is None or (height, width) == (image_size, image_size):
        return arrays
    scale = image_size / min(height, width)
    size = [max(image_size, round(side * scale)) for side in (height, width)]
    top, left = ((side - image_size) // 2 for side in size)
    parts = [
        F.interpolate(part.float(), size=size, mode="bicubic", antialias=True).round_().clamp_(0, 255).byte()
        for part in arrays.images.split(1024)
    ]
    images = torch.cat([part[:, :, top : top + image_size, left : left + image_size] for part in parts])
    return ImageArrays(images.contiguous(), arrays.labels, arrays.label_names)


def _cache_file(data: str, split: str, image_size: int | None, source: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm_gac" / "arrays"
    key = hashlib.sha256(repr((data, split, image_size, source)).encode()).hexdigest()[:16]
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', data)}-{split}-{image_size or 'as-is'}-{key}.npz"


def _load_cache(file: Path) -> ImageArrays:
    with _open_npz(file) as archive:
        images, labels, names = _read(archive, file, ("images", "labels", "label_names"))
    return ImageArrays(_images(images, str(file)), _labels(labels, str(file)), tuple(map(str, names)))
