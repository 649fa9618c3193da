"""Firing rates by epoch: the table, what is warned of and what is not, and a network that really collapses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm
import torch

from gac_kernels import IMAGENET
from timm_gac.analysis.evaluate import Evaluation, evaluate
from timm_gac.hub import calibrate
from timm_gac.train.health import rate_warnings, watch_rates

pytest.importorskip("matplotlib", reason="draws with matplotlib")


def evaluation(**rates: float) -> Evaluation:
    return Evaluation(
        images=1,
        top1=0.5,
        top5=1.0,
        top1_per_step=(0.5,),
        loss=1.0,
        ece=0.0,
        firing_rates=rates,
        seconds=0.0,
    )


def test_only_layers_in_trouble_are_warned_of():
    rates = {"fine": 0.15, "silent": 0.0005, "edge": 0.001, "busy": 0.95, "falling": 0.01}
    before = {"fine": 0.3, "falling": 0.2, "silent": 0.1}
    found = rate_warnings(rates, before)
    assert [text.split()[1] for text in found] == ["silent", "busy", "falling"]
    assert "0.05% (under 0.1%)" in found[0] and "95.0% (over 90%)" in found[1] and "after 20.00%" in found[2]
    (line,) = rate_warnings({str(index): 0.0 for index in range(7)}, before)
    assert line.startswith("warning: 7 layers hardly fire: 0 at 0.00%, 1 at 0.00%, 2 at 0.00%, ... (under 0.1%)")
    assert rate_warnings({"falling": 0.03}, before) == []
    (line,) = rate_warnings({"a": 1.0, "b": 0.95}, {})
    assert line.startswith("warning: 2 layers nearly always fire: a at 100.0%, b at 95.0% (over 90%)")
    (line,) = rate_warnings({"a": 0.01, "b": 0.02}, {"a": 0.2, "b": 0.3})
    assert line.startswith("warning: 2 layers fire much less: a at 1.00% after 20.00%, b at 2.00% after 30.00% (at")


def test_table_grows_and_a_resumed_run_replaces_its_epochs(tmp_path: Path):
    network = torch.nn.Identity()
    for epoch, rate in ((1, 0.2), (2, 0.19), (3, 0.18)):
        assert watch_rates(tmp_path, epoch, evaluation(a=rate, b=0.1), network) == []
    assert len(watch_rates(tmp_path, 2, evaluation(a=0.01, b=0.1), network)) == 1  # 0.2 at epoch 1 is what counts
    rows = list(csv.DictReader((tmp_path / "firing_rates.csv").open()))
    assert [(int(row["epoch"]), float(row["a"]), float(row["b"])) for row in rows] == [(1, 0.2, 0.1), (2, 0.01, 0.1)]
    assert (tmp_path / "firing_rates.png").read_bytes()[:4] == b"\x89PNG"
    assert watch_rates(tmp_path, 3, evaluation(), network) == []


def test_a_network_that_dies_is_warned_of_and_direct_coding_is_not(tmp_path: Path):
    model = timm.create_model("test_gac_msresnet", num_classes=3, encoder="direct")
    images = torch.randn(8, 3, 16, 16)
    calibrate(model, [images])
    batches = [(images, torch.arange(8) % 3)]
    assert watch_rates(tmp_path, 1, evaluate(model, batches), model) == []
    torch.nn.init.constant_(model.layer2[0].bn1.bias, -50.0)
    warnings = watch_rates(tmp_path, 2, evaluate(model, batches), model)
    assert [text.split()[1] for text in warnings] == ["layer2.0.bn1"]


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({"gate": "half"}, []),  # 0.5 + 0.25 + ... stays below the threshold of 1
        ({"gate": "half", "spec": IMAGENET}, ["lif"]),
        ({"gate": "half", "neuron": "plif"}, ["lif"]),
        ({"gate": "full"}, ["lif"]),
    ],
)
def test_a_layer_that_is_meant_to_be_silent_is_not_warned_of(tmp_path: Path, changed: dict, warned: list[str]):
    model = timm.create_model("test_gac_msresnet", num_classes=3, **changed)
    images = torch.randn(8, 3, 16, 16)
    calibrate(model, [images])
    if not warned:
        assert evaluate(model, [(images, torch.arange(8) % 3)]).firing_rates["lif"] == 0
    assert [text.split()[1] for text in watch_rates(tmp_path, 1, evaluation(lif=0.0, other=0.2), model)] == warned
