"""What data a run was trained on, in a form that a checkpoint can hold and a resumed run can compare."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..data import DeviceLoader, ImageArrays, StreamLoader

HASHED_BYTES = 2**28  # of larger sets every n-th image is hashed: 256 MiB take under a second


def describe_data(data: ImageArrays | DeviceLoader | StreamLoader) -> dict[str, Any]:
    """Number, classes and hash of a set in memory or of a streamed one, ready for JSON."""
    return describe_arrays(data) if isinstance(data, ImageArrays) else describe_stream(data)


def describe_arrays(arrays: ImageArrays) -> dict[str, Any]:
    """Number, shape, classes and hash of a set in memory, ready for JSON."""
    images = arrays.images
    step = -(-images.numel() // HASHED_BYTES)
    digest = hashlib.sha256(arrays.labels.numpy().tobytes())
    digest.update(images[::step].contiguous().numpy())
    return {
        "images": len(images),
        "shape": list(images.shape[1:]),
        "classes": arrays.num_classes,
        "label_names": _hash_of("\n".join(arrays.label_names)),
        "content": digest.hexdigest()[:16],
    }


def describe_stream(loader: DeviceLoader | StreamLoader) -> dict[str, Any]:
    """Number, class names and hash of the file names of a streamed set, ready for JSON."""
    dataset: Any = loader._loader.dataset  # type: ignore[union-attr]  # only streams have one
    source = getattr(dataset, "source", dataset)
    samples = getattr(getattr(source, "reader", source), "samples", None) or ()
    files = [f"{Path(sample[0]).name} {sample[1]}" for sample in samples if isinstance(sample, tuple | list)]
    return {
        "images": loader.num_images,
        "classes": len(loader.label_names),  # type: ignore[union-attr]
        "label_names": _hash_of("\n".join(loader.label_names)),  # type: ignore[union-attr]
        "content": _hash_of("\n".join(files)),
    }


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume a run with other data than it began with.

    Args:
        before: Split to its description, from a checkpoint.
        now: The same of the data at hand.

    Raises:
        ValueError: They differ; the message says in what.
    """
    changes = [
        f"{name} of the {split} set: {before[split].get(name)} became {value}"
        for split, described in now.items()
        if isinstance(before.get(split), dict)
        for name, value in described.items()
        if before[split].get(name) != value
    ]
    if changes:
        raise ValueError(
            f"expected the data that this run began with, got other data ({'; '.join(changes)[:300]}): give the same "
            "--data, or begin anew in another --out"
        )


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
