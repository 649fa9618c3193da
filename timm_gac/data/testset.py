"""A labelled set to evaluate on: small images in memory, large ones and sequences decoded batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import resolve_data_config

from .arrays import Split, load_arrays
from .dataset import class_names, open_dataset
from .loader import DeviceLoader
from .stream import StreamLoader, create_plain_loader
from .transforms import Normalizer

SMALL = 64  # pixels: a set of images up to this side fits into memory
_SEQUENCES = ("wds", "hfids", "tfds")  # read from front to back only


def open_test_set(
    data: str,
    cfg: Mapping[str, Any],
    *,
    num_classes: int | None,
    label_names: Sequence[str] = (),
    split: Split = "test",
    data_dir: str | None = None,
    image_size: int | None = None,
    images: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> DeviceLoader | StreamLoader:
    """Batches of images as a network wants them, and their labels, each image once and in order.

    Args:
        data: What `load_arrays` takes, or any other name of `timm.data.create_dataset`.
        cfg: The network's ``pretrained_cfg``: size, mean and std, crop and interpolation.
        num_classes: Classes of the network; None where the labels do not matter.
        label_names: Names of the network's classes, to which those of the data are matched; empty where unknown.
        split: Split of the data set.
        data_dir: Folder of the data set, for timm's names.
        image_size: Side of the images in pixels; the network's own height and width where None.
        images: Only so many, evenly spread over the set.
        batch_size: Images a batch.
        num_workers: Processes that decode.
        device: Where the batches are to be.
        progress: Show how far decoding of small images is.

    Returns:
        The loader. Its ``present_classes`` are the labels that the set has, sorted, where these are only some of the
        network's; None where they are all, or not known.

    Raises:
        ValueError: There is no such data set, or it does not fit the network.
    """
    if images is not None and images < 1:
        raise ValueError(f"expected at least 1 image, got {images}: raise it, or leave it out for all of them")
    crop = resolve_data_config(pretrained_cfg=dict(cfg))
    channels, *size = crop["input_size"]
    if image_size is not None:
        size = [image_size, image_size]
        crop["input_size"] = (channels, *size)
    in_memory = data.endswith(".npz") or data == "digits"
    if channels not in (1, 3) and not in_memory:
        raise ValueError(f"expected a network for 1 or 3 channels, as pictures have, got one for {channels}")
    source: dict[str, Any] = {
        "data_dir": data_dir,
        "label_names": label_names if num_classes else (),
        "channels": channels,
    }
    if in_memory or (max(size) <= SMALL and data.partition("/")[0].lower() not in _SEQUENCES):
        arrays = load_arrays(
            data,
            split,
            image_size=(size[0], size[1]),
            preprocessing=crop,
            cache=True,
            progress=progress,
            **source,
        )
        _check_classes(arrays.label_names, label_names, num_classes, data)
        present = arrays.labels.unique().tolist()
        if images is not None and images < len(arrays.labels):
            chosen = torch.arange(images) * len(arrays.labels) // images
            arrays = replace(arrays, images=arrays.images[chosen], labels=arrays.labels[chosen])
        loader: DeviceLoader | StreamLoader = DeviceLoader(
            arrays,
            batch_size,
            augmentation=None,
            num_classes=arrays.num_classes if num_classes is None else num_classes,
            seed=0,
            training=False,
            mean=crop["mean"],
            std=crop["std"],
            device=device,
        )
        loader.present_classes = _some(present, num_classes)
        return loader
    dataset = open_dataset(data, split, is_training=False, batch_size=batch_size, seed=0, **source)
    _check_classes(class_names(dataset), label_names, num_classes, data)
    pictures = create_plain_loader(
        dataset,
        input_size=(channels, *size),
        batch_size=batch_size,
        device=torch.device(device),
        num_workers=num_workers,
        crop_pct=crop["crop_pct"],
        crop_mode=crop["crop_mode"],
        interpolation=crop["interpolation"],
    )
    loader = StreamLoader(
        pictures,
        augmenter=None,
        normalizer=Normalizer(crop["mean"], crop["std"], torch.device(device), torch.float32),
        batch_size=batch_size,
        seed=0,
        rank=0,
        world_size=1,
        images=images,
    )
    loader.present_classes = _some(sorted(getattr(dataset, "labels", None) or ()), num_classes)
    return loader


def _some(present: list[int], num_classes: int | None) -> list[int] | None:
    """The labels that a set has where they are only some of the network's."""
    return present if num_classes is not None and 0 < len(present) < num_classes else None


def _check_classes(found: Sequence[str], wanted: Sequence[str], num_classes: int | None, data: str) -> None:
    """Refuse classes that cannot be the network's.

    Raises:
        ValueError: They are more than the network's, or fewer and the network's have no names to match them by.
    """
    if num_classes is None or not found:
        return
    if len(found) > num_classes:
        raise ValueError(
            f"expected at most the network's {num_classes} classes in {data!r}, got {len(found)}: "
            "choose another set or network"
        )
    if not wanted and len(found) < num_classes:
        raise ValueError(
            f"expected all of the network's {num_classes} classes in {data!r}, got {len(found)}: the network's classes "
            "have no names to match them by; add label_names to its config.json"
        )
