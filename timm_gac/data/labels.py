"""Names of the classes of data sets whose files hold numbers only."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["known_label_names"]

_FILE = Path(__file__).with_name("label_names.json")


def known_label_names(dataset: str) -> tuple[str, ...]:
    """The class names of a data set in the order of its labels; empty for one that is not known here.

    The order is that of the data set's own files: CIFAR-100's 100 fine labels and CIFAR-10's 10, both alphabetical.

    Args:
        dataset: Its name, such as ``cifar100`` or ``CIFAR-100``.
    """
    names = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(names.get(dataset.lower().replace("-", ""), ()))
