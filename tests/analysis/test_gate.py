"""What a gate does and what a network loses without it, on networks whose gate is known."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from gac_kernels import CIFAR
from timm_gac.analysis.gate import firing_level, gate_statistics, replaced_scores, try_gates, weight_and_gradient
from timm_gac.hub.open import calibrate
from timm_gac.inference.record import record_spikes
from timm_gac.layers.encoder import ConstantScore


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=5)
    return calibrate(model, [torch.randn(8, 3, 12, 12)])


def test_below_the_firing_level_the_neuron_behind_never_fires(network: nn.Module) -> None:
    level = firing_level(CIFAR, 4)
    assert level == pytest.approx(1 / (1 + 0.5 + 0.25 + 0.125))
    batches = [(torch.randn(4, 3, 12, 12), torch.arange(4))]
    fires = []
    for gate in (level - 0.01, level + 0.01):
        with replaced_scores(network, (ConstantScore(1.0), ConstantScore(math.log(gate / (1 - gate))))):
            fires.append(try_gates(network, batches, 0.6)[0].lif)
    assert fires[0] == 0 and fires[1] > 0


def test_variance_is_attributed_to_what_varies(network: nn.Module) -> None:
    class Ramp(nn.Module):
        def forward(self, average: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
            return torch.tensor([-1.0, 0.0, 1.0, 2.0]).expand_as(average)

    with replaced_scores(network, (Ramp(), ConstantScore(1.0))):
        found = gate_statistics(network, [torch.randn(3, 3, 12, 12), torch.randn(2, 3, 12, 12)])
    gate = torch.tensor([-1.0, 0.0, 1.0, 2.0]).sigmoid()
    assert found.images == 5 and found.mean == pytest.approx(float(gate.mean()), abs=1e-6)
    assert found.std == pytest.approx(float(gate.std(correction=0)), abs=1e-6)
    assert found.shares["steps"] == pytest.approx(1, abs=1e-5)
    assert max(found.shares[name] for name in ("images", "channels", "pixels")) < 1e-6
    assert found.above_level == pytest.approx(0.5) and found.spatial_std == 0


def test_what_no_axis_explains_alone_is_interactions(network: nn.Module) -> None:
    """A checkerboard with one colour swapped from channel to channel has the same mean wherever one looks."""

    class Board(nn.Module):
        def forward(self, stem: torch.Tensor) -> torch.Tensor:
            axes = [torch.arange(size) for size in stem.shape[1:]]
            parity = sum(torch.meshgrid(*axes, indexing="ij")) % 2
            return (2.0 * parity - 1).expand_as(stem)

    images = [torch.randn(2, 3, 12, 12)]
    with replaced_scores(network, (ConstantScore(1.0), Board())):
        found = gate_statistics(network, images)
    assert found.shares["interactions"] == pytest.approx(1, abs=1e-5)
    trained = gate_statistics(network, images).shares
    assert sum(trained.values()) == pytest.approx(1, abs=1e-6) and min(trained.values()) > 0


def test_what_lies_between_images_and_what_is_shut_or_open(network: nn.Module) -> None:
    """Against PyTorch's own variance over images at each place, in one batch and in parts of other sizes."""
    with torch.no_grad():
        network.encoder.spatial.conv_b.weight.mul_(60)
        network.encoder.temporal.fc2.weight.mul_(-1)
    images = torch.randn(7, 3, 12, 12)
    with record_spikes(network) as recording, torch.no_grad():
        network(images)
    gate = recording.gate.double()
    expected = float(gate.var(0, correction=0).mean() / gate.var(correction=0))
    for parts in ([images], images.split((4, 2, 1))):
        found = gate_statistics(network, parts)
        assert found.between_images == pytest.approx(expected, abs=1e-5) and 0.01 < expected < 0.99
        assert found.shut == pytest.approx(float((gate < 0.01).double().mean()), abs=1e-4) and found.shut > 0
        assert found.open == pytest.approx(float((gate > 0.99).double().mean()), abs=1e-4) and found.open > 0
        assert found.largest_temporal == pytest.approx(float(recording.scores["temporal"].abs().max()))
        assert found.std == pytest.approx(float(gate.std(correction=0)))
    same = gate_statistics(network, [images[:1].expand(3, -1, -1, -1)])
    assert same.between_images < 1e-6 and same.std > 0


def test_a_network_is_left_as_it_was(network: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.randn(8, 3, 12, 12), torch.arange(8) % 5
    rows = try_gates(network, [(images, labels)], 0.55, lambda copy: calibrate(copy, [images]))
    assert rows[0].gate == "as trained" and rows[0].agree == 1
    parts = weight_and_gradient(network, images, labels)
    assert {"encoder.temporal", "encoder.spatial", "conv1", "layer1", "fc"} <= parts.keys()
    assert all(weight > 0 and gradient > 0 for weight, gradient in parts.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())


def test_an_open_gate_and_a_learned_neuron_behind_it() -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=5, gate="open", neuron="plif").eval()
    model.lif.learned.set_values(torch.tensor([0.25]), torch.tensor([2.0]))
    images = torch.randn(4, 3, 12, 12)
    found = gate_statistics(model, [images])
    assert found.mean == 1 and found.firing_level == pytest.approx(2 / (1 + 1 / 4 + 1 / 16 + 1 / 64))
    rows = try_gates(model, [(images, torch.arange(4))], found.mean)
    assert [row.agree for row in rows if row.gate.startswith(("its mean", "1 "))] == [1, 1]


def test_direct_coding_is_refused() -> None:
    model = timm.create_model("msresnet18_cifar", device="meta")
    with pytest.raises(ValueError, match="expected a network with gated attention coding, got DirectCoding"):
        gate_statistics(model, [])
