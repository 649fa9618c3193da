"""The rate of this package's own loaders, without a network: small images from an .npz, pictures from a folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...data import Augmentation, DeviceLoader, create_stream_loaders, load_arrays
from ...data.arrays import save_arrays
from ..harness import Row
from ..session import Case
from .clock import Clock

CLASSES, CHANNELS = 10, 3
SMALL = 64  # pixels: pictures of a network for small images are stored in their own size, others in PICTURE
PICTURE = 256
MEAN = STD = (0.5,) * CHANNELS


def measure_loader(kind: str, case: Case, device: torch.device, seconds: float) -> Row:
    """Images a second of a loader that augments on the device: padded crops and mirroring.

    Args:
        kind: ``npz``, `DeviceLoader`, or ``folder``, `StreamLoader`: JPEG files, decoded by worker processes.
        case: Batch and image size.
        device: Where the batches are to be.
        seconds: How long to measure.
    """
    augmentation = Augmentation(crop_padding=4, flip=True)
    shared: dict[str, Any] = dict(mean=MEAN, std=STD, augmentation=augmentation, num_classes=CLASSES, seed=0)
    pictures, clock = max(1024, 2 * case.batch), Clock(device, seconds)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "npz":
            _write_npz(Path(folder) / "pictures.npz", pictures, case.image_size)
            arrays = load_arrays(str(Path(folder) / "pictures.npz"), "train")
            loader: Any = DeviceLoader(arrays, case.batch, device=device, training=True, **shared)
            note = f"{pictures} images"
        else:
            side = case.image_size if case.image_size <= SMALL else PICTURE
            workers = min(16, os.cpu_count() or 1)
            _write_folder(Path(folder), pictures, side)
            sizes = dict(image_size=case.image_size, batch_size=case.batch)
            options = dict(data_dir=folder, device=device, num_workers=workers)
            loader, _ = create_stream_loaders("folder", **sizes, **options, **shared)  # type: ignore[arg-type]
            note = f"{pictures} JPEG files of {side}x{side}, {workers} workers"
        for _ in _batches(loader, clock):
            pass
    return clock.row(case.batch) | {"status": "ok", "note": note}


def _batches(loader: Any, clock: Clock) -> Iterator[object]:
    for epoch in count():
        for batch in loader.batches(epoch):
            if not clock.tick():
                return
            yield batch


def _write_npz(file: Path, images: int, side: int) -> None:
    rng = np.random.default_rng(0)
    parts = {"train": images, "test": CLASSES}
    pixels = {f"x_{part}": rng.integers(0, 256, (n, CHANNELS, side, side), np.uint8) for part, n in parts.items()}
    save_arrays(file, pixels | {f"y_{part}": np.arange(n) % CLASSES for part, n in parts.items()})


def _write_folder(folder: Path, images: int, side: int) -> None:
    """Smooth pictures, which compress as photographs do, in ``train`` and ``val``."""
    rng = np.random.default_rng(0)
    for part, number in (("train", images), ("val", CLASSES)):
        for index in range(number):
            target = folder / part / str(index % CLASSES)
            target.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (max(4, side // 8), max(4, side // 8), CHANNELS), np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(target / f"{index}.jpg")
