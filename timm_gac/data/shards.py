"""CIFAR out of the shards of a federated benchmark (PFLlib), with its official split found again.

PFLlib joins training and test set, shuffles the places of each class with numpy's generator seeded with 1, deals them
to clients by a Dirichlet distribution and splits each client's part anew. All of this depends on the class sizes alone,
so it can be done again: it tells every image's class and its place in that class, and places below the number of
training images a class are the official training set. The shards' own labels and the sizes in config.json show whether
it was done alike.
"""

from __future__ import annotations

import json
import math
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TRAIN_PER_CLASS = {"cifar10": 5000, "cifar100": 500}
CONFIG = "config.json"
_SIDE, _CHANNELS = 32, 3
_TRAIN_SHARE = 0.75  # of each client's images, in PFLlib
_SIZES = "Size of samples for labels in clients"
_TRIES = 1000
_MAX_CELLS = 10**7  # clients times classes
_DAMAGE = (
    *(OSError, ValueError, LookupError, EOFError, OverflowError, MemoryError, RuntimeError),  # 7-zip's methods, ciphers
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class Recovered:
    """What `read_shards` found.

    Attributes:
        arrays: ``x_train``, ``y_train``, ``x_test``, ``y_test``, by class and then in the order of the original set.
        shards: Number of shards read, all of whose labels are in the order of the deal.
        missing: Names of shards that are not there.
        lost: Images of these, by split.
    """

    arrays: dict[str, np.ndarray]
    shards: int
    missing: tuple[str, ...]
    lost: dict[str, int]


def deal(sizes: np.ndarray, alpha: float, least: int) -> list[dict[str, np.ndarray]]:
    """Deal a set to clients as PFLlib does (``separate_data`` with the partition ``dir``, then ``split_data``).

    Args:
        sizes: Images of each client and class, (clients, classes), to compare with; every class has as many.
        alpha: Of the Dirichlet distribution.
        least: Smallest number of images of a client; deals with fewer are done again.

    Returns:
        For each client its ``test`` and ``train`` images in order: rows (class, place in the class).

    Raises:
        ValueError: No deal gives these sizes.
    """
    clients, per_class = len(sizes), int(sizes[:, 0].sum())
    mean, rng = sizes.sum() / clients, np.random.RandomState(1)
    for _ in range(_TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        counts = np.zeros(clients, int)
        for label in range(sizes.shape[1]):
            places = np.arange(per_class)
            rng.shuffle(places)
            shares = rng.dirichlet(np.repeat(alpha, clients)) * (counts < mean)
            cuts = (np.cumsum(shares / shares.sum()) * per_class).astype(int)[:-1]
            for client, part in enumerate(np.split(places, cuts)):
                parts[client].append(np.stack([np.full(len(part), label), part], 1))
                counts[client] += len(part)
        if counts.min() >= least:
            break
    dealt = [np.concatenate(part) for part in parts]
    found = np.stack([np.bincount(part[:, 0], minlength=sizes.shape[1]) for part in dealt])
    if not np.array_equal(found, sizes):
        raise ValueError(
            f"expected the class sizes of a deal of PFLlib with seed 1 and alpha {alpha} in {CONFIG}, got others in "
            f"{int((found != sizes).any(1).sum())} of {clients} clients: the official split cannot be found"
        )
    result = []
    for part in dealt:  # scikit-learn's train_test_split: the first of a permutation are the test set
        order = rng.permutation(len(part))
        test = len(part) - math.floor(_TRAIN_SHARE * len(part))
        result.append({"test": part[order[:test]], "train": part[order[test:]]})
    return result


def read_shards(folder: Path, train_per_class: int, num_classes: int | None = None) -> Recovered:
    """Read a set from its shards and restore the official split.

    Args:
        folder: With config.json, ``train/NUMBER.npz`` and ``test/NUMBER.npz``.
        train_per_class: Images of each class in the official training set.
        num_classes: Classes that the set has to have; None for any number.

    Raises:
        ValueError: There are no such files, they hold another set, the deal cannot be done again, or a shard's labels
            are in another order.
    """
    sizes, alpha, least = _read_config(folder)
    per_class = sorted(set(sizes.sum(0).tolist()))
    if (num_classes or sizes.shape[1]) != sizes.shape[1] or len(per_class) != 1 or per_class[0] <= train_per_class:
        raise ValueError(
            f"expected {num_classes or 'any number of'} classes of as many images each, more than the "
            f"{train_per_class} to train on, in {str(folder / CONFIG)!r}, got {sizes.shape[1]} of "
            f"{' or '.join(map(str, per_class[:3]))}: check the name of the set"
        )
    images, rows = list[np.ndarray](), list[np.ndarray]()
    missing, lost, count = list[str](), {"train": 0, "test": 0}, 0
    for client, parts in enumerate(deal(sizes, alpha, least)):
        for split, dealt in parts.items():
            file = folder / split / f"{client}.npz"
            if not file.is_file():
                missing.append(f"{split}/{client}.npz")
                of_training = int((dealt[:, 1] < train_per_class).sum())
                lost["train"] += of_training
                lost["test"] += len(dealt) - of_training
                continue
            pixels, labels = _read_shard(file, len(dealt))
            if not np.array_equal(labels, dealt[:, 0]):
                raise ValueError(f"expected the labels of {file} in the order of the deal, got others: not PFLlib's")
            images.append(pixels)
            rows.append(dealt)
            count += 1
    if not images:
        raise ValueError(f"expected shards train/0.npz, test/0.npz, ... in {str(folder)!r}, got none: check the path")
    pixels, table = np.concatenate(images), np.concatenate(rows)
    arrays: dict[str, np.ndarray] = {}
    for split, chosen in (("train", table[:, 1] < train_per_class), ("test", table[:, 1] >= train_per_class)):
        places = np.flatnonzero(chosen)
        places = places[np.lexsort((table[places, 1], table[places, 0]))]
        arrays |= {f"x_{split}": pixels[places], f"y_{split}": table[places, 0]}
    return Recovered(arrays, count, tuple(missing), lost)


def _read_config(folder: Path) -> tuple[np.ndarray, float, int]:
    """Class sizes (clients, classes), alpha of the deal, and the smallest number of images of a client."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        shape = config["num_clients"], config["num_classes"]
        if min(shape) < 1 or math.prod(shape) > _MAX_CELLS or len(config[_SIZES]) != shape[0]:
            raise ValueError(f"{shape[0]} clients and {shape[1]} classes")
        sizes = np.zeros(shape, int)
        for client, row in enumerate(config[_SIZES]):
            for label, count in row:
                if not 0 <= label < shape[1] or count < 0:
                    raise ValueError(f"{count} images of class {label}")
                sizes[client, label] = count
        alpha, least = float(config["alpha"]), math.ceil(config["batch_size"] / (1 - _TRAIN_SHARE))
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha {alpha}")
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise ValueError(
            f"expected PFLlib's {CONFIG} in {str(folder)!r}, got none that can be read ({error}): fetch it anew"
        ) from error
    return sizes, alpha, least


def _read_shard(file: Path, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, 3, 32, 32) and labels of a shard.

    The file holds a pickled dictionary of two arrays. It is not unpickled, which could run any code: their bytes are
    the arguments of two of its instructions, which are listed only.
    """
    shape = (images, _CHANNELS, _SIDE, _SIDE)
    wanted = {math.prod(shape) * 4: "x", images * 8: "y"}
    found: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            content = archive.read("data.npy")
        start = 10 + int.from_bytes(content[8:10], "little")  # behind numpy's header
        for _, argument, _ in pickletools.genops(content[start:]):
            if isinstance(argument, bytes) and len(argument) in wanted:
                found[wanted[len(argument)]] = argument
    except _DAMAGE as error:
        raise ValueError(
            f"expected a shard of PFLlib in {file}, got one that cannot be read ({error}): fetch it anew"
        ) from error
    if found.keys() != {"x", "y"}:
        raise ValueError(f"expected {images} images of 3x32x32 and their labels in {file}, got others: it is damaged")
    exact = (np.frombuffer(found["x"], "<f4").reshape(shape) * 0.5 + 0.5) * 255  # ToTensor, Normalize(0.5, 0.5)
    pixels = np.rint(exact)
    if not (np.abs(exact - pixels) < 1e-3).all() or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"expected whole grey values in {file}, normalised by 0.5 and 0.5, got others: it is damaged")
    return pixels.astype(np.uint8), np.frombuffer(found["y"], "<i8")
