"""Agreement between number formats: what is counted, against a count by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from timm_gac.analysis.agreement import FORMATS, compare_formats
from timm_gac.cli.compare import tables
from timm_gac.hub.open import calibrate
from timm_gac.inference.record import record_spikes


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=7)
    return calibrate(model, [torch.randn(8, 3, 12, 12)])


@torch.no_grad()
def test_counts_are_those_by_hand(network: nn.Module) -> None:
    images, labels = torch.randn(12, 3, 12, 12), torch.arange(12) % 7
    batches = list(zip(images.split(5), labels.split(5), strict=True))
    report = compare_formats(network, batches, ("float32", "bfloat16"))
    with record_spikes(network) as own:
        steps = network.forward_steps(images)
    with record_spikes(network) as other, torch.autocast("cpu", torch.bfloat16):
        rough = network.forward_steps(images)
    same = steps.mean(1).argmax(1) == rough.float().mean(1).argmax(1)
    reference, found = report.rows
    assert reference.agree == 1 and not any(reference.layers.values()) and reference.logit_difference == 0
    assert found.agree == pytest.approx(float(same.double().mean()))
    assert found.agree_per_step[-1] == found.agree == report.pairs["float32"]["bfloat16"]
    assert sum(count for _, count, _ in found.by_margin) == 12
    for name, spikes in own.spikes.items():
        differ = ((spikes != 0) != (other.spikes[name] != 0)).double().mean()
        assert found.layers[name] == pytest.approx(float(differ)), name
    assert max(found.layers.values()) > 0


def test_every_format_runs_and_leaves_the_network_alone(network: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = compare_formats(network, [(torch.randn(4, 3, 12, 12), torch.arange(4))], FORMATS)
    assert [row.format for row in report.rows] == list(FORMATS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    shown = tables(report, "")
    assert [len(table.rows) for table in shown][:2] == [len(FORMATS)] * 2
    _, counts, *shares = [list(column.cells) for column in shown[2].columns]
    assert {"0"} < set(counts)  # a margin without an image has no share
    assert all([cell == "-" for cell in cells] == [count == "0" for count in counts] for cells in shares)


@pytest.mark.parametrize("formats", [("float32",), ("float32", "float32"), ("float32", "fp8")])
def test_wrong_formats_are_refused(network: nn.Module, formats: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        compare_formats(network, [], formats)


def test_a_network_without_int8_is_told_what_to_compare() -> None:
    ternary = timm.create_model("test_gac_msresnet", num_classes=5, neuron="ternary")
    with pytest.raises(ValueError, match=r"for 8-bit inference, got 'ternary'.*--formats float32 folded"):
        compare_formats(ternary, [], ("float32", "int8"))
