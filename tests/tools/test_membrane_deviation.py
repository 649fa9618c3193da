"""tools/membrane_deviation.py: its membranes fire the network's spikes, and its columns are those by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import membrane_deviation as tool
import timm_gac
from gac_kernels import LIFSpec
from timm_gac.analysis.agreement import compare_formats
from timm_gac.hub import save_model_folder
from timm_gac.hub.open import calibrate
from timm_gac.inference.record import record_spikes


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return calibrate(timm.create_model("test_gac_msresnet", num_classes=4), [torch.randn(8, 3, 12, 12)]).eval()


class Layer:
    """What `membranes` asks of a layer."""

    spec = LIFSpec(threshold=2.0, decay=0.5)


def test_membranes_are_those_before_reset() -> None:
    found = tool.membranes(Layer(), torch.tensor([1.0, 1.8, 2.0, 0.0]).view(4, 1))
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 2.3, 2.0, 1.0]))  # 2.3 fires, 2.0 does not


def test_counts_are_those_by_hand() -> None:
    counts = tool.Counts()
    exact = torch.tensor([[1.8, 2.4, 1.0, 2.0]])  # of one step, so these are the membranes
    own, whole = torch.tensor([0.4, 0.0, 0.0, 0.0]), torch.tensor([0.4, -0.8, 0.0, 0.4])
    counts.add(Layer(), exact, exact + own, exact + whole)
    row = counts.row()
    assert row["own"] == pytest.approx((0.04 / 4) ** 0.5) and row["whole"] == pytest.approx((0.24 / 4) ** 0.5)
    assert row["own flips"] == 0.25 and row["flips"] == 0.75
    assert row["median at flips"] == pytest.approx(0.1, abs=3e-4)
    assert row["90 % at flips"] == pytest.approx(0.2, abs=3e-4)
    assert row["within whole"] == 0.75  # 0.245 thresholds: all but 1.0


@torch.no_grad()
def test_layers_of_a_network(network: Any) -> None:
    images = torch.randn(6, 3, 12, 12)
    exact, given = tool.run_exact(network, images)
    with record_spikes(network) as own:
        network(images)
    assert exact.keys() == own.spikes.keys()
    for name, spikes in own.spikes.items():
        layer = network.get_submodule(name)
        fired = tool.membranes(layer, exact[name]) > layer.spec.threshold
        assert torch.equal(fired.flatten(0, 1), spikes != 0), name
    alone = tool.run_alone(network, images, exact, given, torch.float32)
    for name, current in exact.items():  # without rounding nothing moves
        torch.testing.assert_close(alone[name], current, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    rows = tool.measure(network, images, "bfloat16", 4)
    flips = compare_formats(network, [(images, torch.arange(6) % 4)], ("float32", "bfloat16")).rows[1].layers
    for name, row in rows.items():
        assert row["flips"] == pytest.approx(flips[name], abs=2e-3), name
        assert 0.0 < row["own"] < 0.1, name
    assert rows["encoder"]["own"] == rows["encoder"]["whole"]
    last = rows[list(rows)[-1]]
    assert last["whole"] > 2.0 * last["own"]


def test_it_prints_and_writes(network: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model_folder(network, tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 12, 12), dtype=np.uint8)
    labels = np.arange(8) % 4
    np.savez(tmp_path / "toy.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    given = [str(folder), "--data", str(tmp_path / "toy.npz"), "--images", "4", "--json", str(tmp_path / "out.json")]
    assert tool.main(given) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert written["images"] == 4 and all(name in printed for name in written["layers"])


@pytest.mark.parametrize("options", [{"block": "SpikingBlock"}, {"neuron": "plif"}, {"neuron": "ternary"}])
def test_other_networks_are_refused(options: dict[str, str]) -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=4, **options)
    assert isinstance(model, timm_gac.models.SpikingResNet)
    with pytest.raises(ValueError, match="expected"):
        tool.measure(model, torch.randn(2, 3, 12, 12), "bfloat16", 2)
