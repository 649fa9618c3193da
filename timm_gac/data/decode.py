"""Decoding of a timm data set, once, into one array."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["class_names", "decode_dataset", "fingerprint", "fit", "open_dataset"]

BATCH = 64
# The split as the file systems' and the Hub's data sets call it; timm maps "validation" to val and valid in folders.
_TEST_SPLITS = ("validation", "test", "val")


def open_dataset(data: str, split: str, data_dir: str | None, **options: Any) -> Any:
    """A data set of `timm.data.create_dataset` for ``train`` or ``test``.

    For ``test`` the folder (or the Hub's split) of that name is taken where there is one, else the validation set.

    Args:
        data: Name as timm takes it.
        split: ``train`` or ``test``.
        data_dir: Folder of the data set.
        options: Further arguments for timm.

    Raises:
        ValueError: There is no such folder, split or data set, or a package for it is missing.
    """
    from timm.data import create_dataset

    local = data.partition("/")[0].lower() not in ("hfds", "hfids", "tfds")
    if local and (data_dir is None or not Path(data_dir).is_dir()):
        raise ValueError(
            f"expected data_dir to be the folder of the data {data!r}, got {data_dir!r}: give that folder, "
            "or the path of an .npz file as data"
        )
    name = "" if data == "folder" else data  # timm's own name for it is the empty one
    try:
        return create_dataset(name, root=data_dir, split=_split_name(data, split, data_dir), **options)
    except (RuntimeError, AssertionError, ImportError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected a data set that timm can open, got {data!r} with: {error}") from error


def _split_name(data: str, split: str, data_dir: str | None) -> str:
    kind = data.partition("/")[0].lower()
    if kind == "hfds" and split == "test":
        return _hub_test_split(data.partition("/")[2])
    if kind in ("torch", "hfids", "tfds", "wds"):
        return "validation" if split == "test" else split
    root = Path(data_dir or "")
    names = ("train", "training") if split == "train" else ("test", "val", "valid", "validation", "eval", "evaluation")
    for name in names:
        if (root / name).is_dir():
            return name
    raise ValueError(
        f"expected one of the folders {', '.join(names)} in {root}, got none: sort the images as "
        f"{root / names[0]}/CLASS/IMAGE"
    )


def _hub_test_split(name: str) -> str:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError("expected the package datasets for hfds/..., got none: pip install datasets") from error
    splits = datasets.get_dataset_split_names(name)
    for candidate in _TEST_SPLITS:
        if candidate in splits:
            return candidate
    raise ValueError(f"expected one of the splits {', '.join(_TEST_SPLITS)} in {name}, got {', '.join(splits)}")


def class_names(dataset: Any) -> tuple[str, ...]:
    """Names of the classes in the order of their labels, or () where the data set has none."""
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if mapping:
        return tuple(str(name) for name in sorted(mapping, key=mapping.get))
    return tuple(map(str, getattr(dataset, "classes", ())))


def fingerprint(dataset: Any, data: str, data_dir: str | None) -> str:
    """Changes when the files of a data set change, as far as it lists them; else name, folder and length."""
    parts = [data, str(Path(data_dir).resolve()) if data_dir else "", str(_length(dataset))]
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    for sample in samples or ():
        if isinstance(sample, (tuple, list)) and isinstance(sample[0], (str, Path)):
            status = Path(sample[0]).stat()
            parts.append(f"{sample[0]} {sample[1]} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _length(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "expected a data set that can be indexed, got a stream: use it with the streaming loader instead"
        )
    return len(dataset)


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Images as uint8 (C, H, W), RGB. timm's own class puts the next image where one is damaged; here that stops."""

    def __init__(self, dataset: Any, image_size: int | None) -> None:
        self._dataset, self._image_size = dataset, image_size

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        reader = getattr(self._dataset, "reader", None)
        try:
            image, label = (self._dataset if reader is None else reader)[index][:2]
            image = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
        except OSError as error:
            raise ValueError(f"expected a readable image as sample {index}, got {error}: repair or remove it") from None
        if self._image_size is not None:
            image = fit(image, self._image_size)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()), -1 if label is None else int(label)


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side resized to ``side``, and of that the centre square."""
    if image.size == (side, side):
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _listed(samples: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return samples


def decode_dataset(
    dataset: Any, image_size: int | None, num_workers: int, progress: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Decode every image.

    Args:
        dataset: Can be indexed, as `open_dataset` gives it.
        image_size: Side in pixels to resize to, or None.
        num_workers: Processes that decode.
        progress: Show a bar.

    Returns:
        Images uint8 (N, 3, H, W), labels int64 (N,), names of the classes.

    Raises:
        ValueError: Images differ in size and there is no ``image_size``, or one cannot be read.
    """
    total = _length(dataset)
    loader: Iterable[list[tuple[Tensor, int]]] = DataLoader(
        _Decoded(dataset, image_size), BATCH, num_workers=num_workers, collate_fn=_listed
    )
    images, labels, done = torch.empty(0, dtype=torch.uint8), torch.empty(total, dtype=torch.int64), 0
    with _bar(total, progress) as advance:
        for samples in loader:
            for image, label in samples:
                if done == 0:
                    images = torch.empty((total, *image.shape), dtype=torch.uint8)
                if image.shape != images.shape[1:]:
                    raise ValueError(
                        f"expected images of one size, got {tuple(image.shape[1:])} after {tuple(images.shape[2:])} "
                        "(H, W): give image_size"
                    )
                images[done], labels[done] = image, label
                done += 1
            advance(len(samples))
    return images, labels, class_names(dataset)


@contextmanager
def _bar(total: int, visible: bool) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not visible) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
