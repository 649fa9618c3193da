"""Names of classes: those of known data sets, and how a data set's classes are matched to a network's."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from .pictures import join_names

_FILE = Path(__file__).with_name("label_names.json")
_SYNSET = re.compile(r"n\d{8}")
_logger = logging.getLogger(__name__)


def known_label_names(dataset: str) -> tuple[str, ...]:
    """The class names of a data set in the order of its labels; empty for one that is not known here.

    The order is that of the data set's own files: CIFAR-100's 100 fine labels and CIFAR-10's 10, both alphabetical.

    Args:
        dataset: Its name, such as ``cifar100`` or ``CIFAR-100``.
    """
    names = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(names.get(dataset.lower().replace("-", ""), ()))


def match_labels(found: Sequence[str], wanted: Sequence[str], data: str, *, strict: bool = False) -> list[int] | None:
    """The label that each class of a data set has in a network, by its name.

    Names are compared without regard to case, and ``_`` and ``-`` are spaces. A name that begins with a synset of
    WordNet, such as ``n02124075 Egyptian cat``, is known by the synset, as ImageNet's folders are called. Where no
    name at all is shared but the number of classes is the same, as for the digits "0" and "zero", the classes are
    taken in order, and a warning says so.

    Args:
        found: Names of the data set's classes, in the order of its labels; empty where it has none.
        wanted: Those of the network or of the training set; empty where unknown.
        data: What the data set is called in an error.
        strict: Refuse classes in order too: both sets name their classes in the same way.

    Returns:
        The network's label for each of the data set's, or None where they are the same.

    Raises:
        ValueError: The data set has a class that the network has not, or a name stands for several classes.
    """
    if not found or not wanted or tuple(found) == tuple(wanted):
        return None
    keys, places = [label_key(name) for name in found], dict[str, int]()
    ambiguous = {key for index, key in enumerate(map(label_key, wanted)) if places.setdefault(key, index) != index}
    foreign = [name for name, key in zip(found, keys, strict=True) if key not in places]
    if len(foreign) == len(found) == len(wanted) and not strict:
        _logger.warning(
            "no class of %s has a name of the network's (%s against %s): they are taken in order",
            data,
            join_names(found, 3),
            join_names(wanted, 3),
        )
        return None
    if foreign:
        raise ValueError(
            f"expected classes among {join_names(wanted)} in {data}, got {join_names(foreign)} too: "
            "rename or remove these, or choose another set"
        )
    if doubled := sorted({name for name, key in zip(found, keys, strict=True) if key in ambiguous}):
        raise ValueError(f"expected one class of each name, got several called {join_names(doubled)}: rename them")
    if len(set(keys)) != len(keys):
        raise ValueError(f"expected classes of different names in {data}, got {join_names(found)}: rename them")
    return [places[key] for key in keys]


def label_key(name: str) -> str:
    """By what names of classes are compared, see `match_labels`."""
    words = name.casefold().replace("_", " ").replace("-", " ").split()
    return words[0] if words and _SYNSET.fullmatch(words[0]) else " ".join(words)
