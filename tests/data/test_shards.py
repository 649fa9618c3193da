"""CIFAR out of PFLlib's shards: a deal made here with numpy's global generator and scikit-learn is found again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from timm_gac.data.shards import read_shards

CLASSES, PER_CLASS, TRAIN, CLIENTS, ALPHA = 3, 60, 50, 3, 5.0


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """The shards, and all images and labels in the order of the official training set and then the test set."""
    split = pytest.importorskip("sklearn.model_selection").train_test_split
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.permutation(np.repeat(np.arange(CLASSES), n)) for n in (TRAIN, PER_CLASS - TRAIN)])
    images = rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    content = (images.astype(np.float32) / 255 - 0.5) / 0.5
    np.random.seed(1)  # as PFLlib does it
    dealt: list[list[int]] = [[] for _ in range(CLIENTS)]
    for label in range(CLASSES):
        places = np.where(labels == label)[0]
        np.random.shuffle(places)
        shares = np.random.dirichlet(np.repeat(ALPHA, CLIENTS))
        shares = np.array([p * (len(d) < len(labels) / CLIENTS) for p, d in zip(shares, dealt, strict=True)])
        cuts = (np.cumsum(shares / shares.sum()) * len(places)).astype(int)[:-1]
        dealt = [d + part.tolist() for d, part in zip(dealt, np.split(places, cuts), strict=True)]
    assert min(map(len, dealt)) >= 40
    sizes = [[[label, int((labels[d] == label).sum())] for label in np.unique(labels[d]).tolist()] for d in dealt]
    config = {"num_clients": CLIENTS, "num_classes": CLASSES, "alpha": ALPHA, "batch_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config | {"Size of samples for labels in clients": sizes}))
    for client, places in enumerate(dealt):
        parts = split(content[places], labels[places], train_size=0.75, shuffle=True)
        for name, x, y in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
            (tmp_path / name).mkdir(exist_ok=True)
            np.savez_compressed(tmp_path / name / f"{client}.npz", data=np.array({"x": x, "y": y}, object))
    return tmp_path, images, labels


def in_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


def test_the_official_split_is_found(folder: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, images, labels = folder
    found = read_shards(path, TRAIN)
    assert found.shards == 6 and not found.missing and found.lost == {"train": 0, "test": 0}
    for split, part in (("train", slice(0, CLASSES * TRAIN)), ("test", slice(CLASSES * TRAIN, None))):
        x, y = in_order(images[part], labels[part])
        assert np.array_equal(found.arrays[f"y_{split}"], y) and np.array_equal(found.arrays[f"x_{split}"], x), split


def test_a_missing_shard_is_counted_and_a_foreign_one_refused(folder: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path = folder[0]
    (path / "train" / "1.npz").rename(path / "kept.npz")
    found = read_shards(path, TRAIN)
    kept = sum(len(found.arrays[f"y_{split}"]) for split in ("train", "test"))
    assert found.missing == ("train/1.npz",) and kept + sum(found.lost.values()) == CLASSES * PER_CLASS
    (path / "kept.npz").rename(path / "train" / "0.npz")
    with pytest.raises(ValueError, match=r"expected .* 0\.npz|expected .*0\.npz"):
        read_shards(path, TRAIN)


def test_another_deal_is_refused(folder: tuple[Path, np.ndarray, np.ndarray]) -> None:
    file = folder[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha": 4.0}))
    with pytest.raises(ValueError, match="the official split cannot be found"):
        read_shards(folder[0], TRAIN)


@pytest.mark.parametrize(
    "change",
    [
        {"num_clients": 0, "Size of samples for labels in clients": []},
        {"num_classes": 0},
        {"num_clients": 10**12},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"Size of samples for labels in clients": [[[0, 10**30]]] * CLIENTS},
        {"Size of samples for labels in clients": [[[-1, 20]]] * CLIENTS},
    ],
)
def test_a_damaged_config_is_refused(folder: tuple[Path, np.ndarray, np.ndarray], change: dict) -> None:
    file = folder[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"expected PFLlib's config\.json"):
        read_shards(folder[0], TRAIN)


def test_shards_of_another_set_are_refused(folder: tuple[Path, np.ndarray, np.ndarray]) -> None:
    assert read_shards(folder[0], TRAIN, CLASSES).shards == 2 * CLIENTS
    for train, classes in ((TRAIN, CLASSES + 1), (PER_CLASS, CLASSES)):
        with pytest.raises(ValueError, match="check the name of the set"):
            read_shards(folder[0], train, classes)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_shard_is_refused(folder: tuple[Path, np.ndarray, np.ndarray], seed: int) -> None:
    """Bytes changed anywhere in it: compressed data, the headers of the archive, or all behind a place cut off."""
    rng, file = np.random.default_rng(seed), folder[0] / "test" / "0.npz"
    content = bytearray(file.read_bytes())
    places = rng.integers(0, len(content), 400)
    for place in places:
        content[place] ^= int(rng.integers(1, 256))
    file.write_bytes(content if seed % 3 else content[: places[0]])
    with pytest.raises(ValueError, match=r"expected .*0\.npz"):
        read_shards(folder[0], TRAIN)
