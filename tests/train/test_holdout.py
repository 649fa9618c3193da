"""A validation split of the training set, on which settings are chosen; the test set is then not read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_gac.data.arrays import ImageArrays, split_arrays
from timm_gac.hub import load_model
from timm_gac.layers.encoder import GATES
from timm_gac.train import Recipe
from timm_gac.train.loop import train
from timm_gac.train.options import parse


def numbered(labels: list[int]) -> ImageArrays:
    """Images that hold their own place."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    return ImageArrays(images, torch.tensor(labels), ("a", "b", "c"))


def test_a_split_takes_a_share_of_each_class_and_is_the_same_each_time() -> None:
    labels = [0] * 40 + [1] * 10 + [2] * 3
    left, aside = split_arrays(numbered(labels), 0.2)
    assert torch.bincount(aside.labels).tolist() == [8, 2, 1]
    places = [set(part.images[:, 0, 0, 0].tolist()) for part in (left, aside)]
    assert places[0] | places[1] == set(range(53)) and not places[0] & places[1]
    assert all(labels[place] == label for place, label in zip(aside.images[:, 0, 0, 0], aside.labels, strict=True))
    again, other = (split_arrays(numbered(labels), 0.2, seed)[1] for seed in (0, 1))
    assert torch.equal(again.images, aside.images) and not torch.equal(other.images, aside.images)
    assert aside.label_names == left.label_names == ("a", "b", "c")


def test_a_class_that_would_be_empty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves images of each class, got 0.2 of the 1 of class 1"):
        split_arrays(numbered([0, 0, 0, 1]), 0.2)


@pytest.mark.parametrize(("changes", "message"), [({"holdout": 0.7}, "0 to 0.5"), ({"stream": True}, "got stream")])
def test_recipes_that_cannot_hold_out_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{"holdout": 0.1} | changes)


def test_recipes_know_every_gate() -> None:
    assert all(Recipe(gate=gate).gate == gate for gate in GATES)
    with pytest.raises(ValueError, match="expected gate out of"):
        Recipe(gate="none")


def test_a_run_is_evaluated_on_what_it_set_aside_and_keeps_its_gate(tmp_path: Path) -> None:
    rng, labels = np.random.default_rng(0), np.arange(80) % 4
    images = (rng.integers(0, 40, (80, 3, 8, 8)) + labels[:, None, None, None] * 70).astype(np.uint8)
    file = tmp_path / "no_test_set.npz"
    np.savez(file, x_train=images, y_train=labels)
    words = f"digits --data {file} --dataset toy --holdout 0.2 --gate temporal --num-steps 2 --epochs 1 --batch-size 16"
    recipe, options = parse([*words.split(), "--warmup-epochs", "0", "--out", str(tmp_path / "run"), "--cpu"], "train")
    assert train(recipe, options) == 0
    run = tmp_path / "run"
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["split"] == "validation" and evaluation["images"] == 16
    (row,) = csv.DictReader((run / "result.csv").open())
    assert row["split"] == "validation" and row["eval_dtype"] == "float32"
    assert row["command"].startswith("train digits --data no_test_set.npz --dataset toy --holdout 0.2")
    assert str(tmp_path) not in row["command"]
    network = load_model(run / "model")
    assert network.encoder.gate == "temporal"
    assert not [name for name in network.state_dict() if name.startswith("encoder.spatial")]
