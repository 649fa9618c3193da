"""The name of a data set, from what a run says of its data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Data sets by their names in timm and torchvision, as the Hub knows them.
DATASETS = {
    "cifar10": ("uoft-cs/cifar10", "CIFAR-10"),
    "cifar100": ("uoft-cs/cifar100", "CIFAR-100"),
    "imagenet": ("ILSVRC/imagenet-1k", "ImageNet-1k"),
    "tinyimagenet": ("", "Tiny-ImageNet-200"),
    "in293": ("", "293 classes of ImageNet"),
    "imagenet1k": ("ILSVRC/imagenet-1k", "ImageNet-1k"),
}
DIGITS = ("", "scikit-learn digits")
_READERS = ("torch", "hfds", "hfids", "tfds", "wds")


def dataset_name(data: Any) -> tuple[str, str] | None:
    """Id on the Hub ('' where there is none) and name of a data set.

    A file or folder is named by itself, with what was measured of it: whatever its recipe is called, its images may be
    others.

    Args:
        data: What a run was given as its data, such as ``torch/cifar100`` or ``photos.npz``; or an object with that as
            ``source`` and with ``images``, ``classes`` and ``content`` (a hash) of its test set.

    Returns:
        None where nothing is known.
    """
    if isinstance(data, Mapping):
        name = dataset_name(data.get("source"))
        measured = ((f"{{:,}} {key}", data.get(key)) for key in ("images", "classes"))
        parts = [text.format(value) for text, value in measured if type(value) is int]
        if isinstance(content := data.get("content"), str):
            parts.append(f"SHA-256 {content[:16]}")
        known = name is not None and (name[0] or name == DIGITS)
        return name if known or not parts else ("", f"{name[1] if name else 'pictures'} ({', '.join(parts)})")
    if not isinstance(data, str) or not data.strip():
        return None
    if data == "digits":
        return DIGITS
    reader, _, rest = data.partition("/")
    if reader in _READERS and rest:
        last = rest.rstrip("/").rpartition("/")[2]
        hub_id = rest if reader in ("hfds", "hfids") and rest.count("/") == 1 else ""
        return DATASETS.get(_key(last), (hub_id, last))
    return DATASETS.get(_key(data)) or ("", re.split(r"[\\/]", data.rstrip("\\/"))[-1] or "pictures")


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
