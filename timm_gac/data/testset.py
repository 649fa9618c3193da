"""A labelled set to evaluate on: small images in memory, large ones and sequences decoded batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .arrays import Split, load_arrays
from .decode import class_names, open_dataset
from .loader import DeviceLoader
from .stream import StreamLoader, create_plain_loader
from .transforms import Normalizer

__all__ = ["open_test_set"]

SMALL = 64  # pixels: a set of images up to this side fits into memory
_SEQUENCES = ("wds", "hfids", "tfds")  # read from front to back only


def open_test_set(
    data: str,
    cfg: Mapping[str, Any],
    *,
    num_classes: int,
    split: Split = "test",
    data_dir: str | None = None,
    image_size: int | None = None,
    images: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> DeviceLoader | StreamLoader:
    """Batches of images as a network wants them, and their labels, each image once and in order.

    Args:
        data: What `load_arrays` takes, or any other name of `timm.data.create_dataset`.
        cfg: The network's ``pretrained_cfg``: size, mean and std, and for large images crop and interpolation.
        num_classes: Classes of the network.
        split: Split of the data set.
        data_dir: Folder of the data set, for timm's names.
        image_size: Side in pixels; the network's own where None.
        images: Only so many, evenly spread over the set.
        batch_size: Images a batch.
        num_workers: Processes that decode.
        device: Where the batches are to be.

    Raises:
        ValueError: There is no such data set, or it does not fit the network.
    """
    if images is not None and images < 1:
        raise ValueError(f"expected at least 1 image, got {images}: raise it, or leave it out for all of them")
    channels, height, width = cfg["input_size"]
    size = (image_size, image_size) if image_size else (height, width)
    in_memory = data.endswith(".npz") or data == "digits"
    shared: dict[str, Any] = {"mean": cfg["mean"], "std": cfg["std"], "device": device}
    if in_memory or (max(size) <= SMALL and data.partition("/")[0].lower() not in _SEQUENCES):
        # An array whose images have the network's size already stays as it is, also where they are no squares.
        arrays = load_arrays(data, split, data_dir=data_dir, image_size=None if in_memory else size[0], cache=True)
        if in_memory and tuple(arrays.images.shape[2:]) != size:
            arrays = load_arrays(data, split, image_size=size[0])
        if images is not None and images < len(arrays.labels):
            chosen = torch.arange(images) * len(arrays.labels) // images
            arrays = replace(arrays, images=arrays.images[chosen], labels=arrays.labels[chosen])
        return DeviceLoader(
            arrays, batch_size, augmentation=None, num_classes=num_classes, seed=0, training=False, **shared
        )
    dataset = open_dataset(data, split, data_dir, is_training=False, batch_size=batch_size, seed=0)
    if len(class_names(dataset)) > num_classes:
        raise ValueError(
            f"expected at most the network's {num_classes} classes in {data!r}, got {len(class_names(dataset))}: "
            "choose another set or network"
        )
    if channels != 3:
        raise ValueError(f"expected a network for 3 channels, as pictures are read, got one for {channels}")
    options = {"crop_pct": cfg.get("crop_pct"), "interpolation": cfg.get("interpolation", "bilinear")}
    loader = create_plain_loader(
        dataset,
        input_size=(channels, *size),
        batch_size=batch_size,
        device=torch.device(device),
        num_workers=num_workers,
        **options,
    )
    return StreamLoader(
        loader,
        augmenter=None,
        normalizer=Normalizer(cfg["mean"], cfg["std"], torch.device(device), torch.float32),
        batch_size=batch_size,
        seed=0,
        rank=0,
        world_size=1,
        images=images,
    )
