"""Decoding of a data set, once, into one array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..runtime.progress import progress_of
from .dataset import PictureDataset

BATCH = 64


def fingerprint(dataset: Any, data: str, data_dir: str | None) -> str:
    """A hash of a data set's name, folder and length and, where it lists its files, of their sizes and dates."""
    parts = [data, str(Path(data_dir).resolve()) if data_dir else "", str(_length(dataset))]
    for sample in getattr(dataset.source, "samples", None) or ():
        if isinstance(sample, (tuple, list)) and isinstance(sample[0], (str, Path)):
            status = Path(sample[0]).stat()
            parts.append(f"{sample[0]} {sample[1]} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _length(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "expected a data set that can be indexed, got a stream: use it with the streaming loader instead"
        )
    return len(dataset)


def _listed(samples: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return samples


def decode_dataset(dataset: PictureDataset, num_workers: int, progress: bool) -> tuple[Tensor, Tensor]:
    """Decode every picture.

    Args:
        dataset: Its `transform` gives uint8 (C, H, W).
        num_workers: Processes that decode.
        progress: Show it.

    Returns:
        Images uint8 (N, C, H, W) and labels int64 (N,).

    Raises:
        ValueError: Pictures differ in size, or one cannot be read; it is named.
    """
    total = _length(dataset)
    loader: Iterable[list[tuple[Tensor, int]]] = DataLoader(dataset, BATCH, num_workers=num_workers, collate_fn=_listed)
    images, labels, done = torch.empty(0, dtype=torch.uint8), torch.empty(total, dtype=torch.int64), 0
    with progress_of("decoding images", total, visible=progress) as advance:
        for samples in loader:
            for image, label in samples:
                if done == 0:
                    images = torch.empty((total, *image.shape), dtype=torch.uint8)
                if image.shape != images.shape[1:]:
                    raise ValueError(
                        f"expected images of one size, got {tuple(image.shape[1:])} after {tuple(images.shape[2:])} "
                        f"(H, W) in {dataset.name(done)!r}: give image_size"
                    )
                images[done], labels[done] = image, label
                done += 1
            advance(len(samples))
    return images, labels
