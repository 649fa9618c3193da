"""Neurons of SpikingJelly and snnTorch, taken over and given back: in small networks of theirs, equal to the spike."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from timm_gac import IMAGENET, LIF, LIFSpec

T = 6


def grid(*shape: int) -> torch.Tensor:
    """Currents on a grid, so that membranes do meet their threshold."""
    return (torch.randn(*shape) * 8).round() / 8


def spikes_and_gradient(network, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = network(x)
    (out * torch.linspace(0.1, 1.0, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), x.grad


def assert_same(theirs, ours, x: torch.Tensor) -> None:
    (a, grad_a), (b, grad_b) = spikes_and_gradient(theirs, x), spikes_and_gradient(ours, x)
    assert 0.02 < a.mean() < 0.98 and torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"
    torch.testing.assert_close(grad_a, grad_b)


def test_a_network_of_spikingjelly(needs) -> None:
    """All surrogates, resets and kinds; swapped in the place of theirs in a network with layers of theirs."""
    sj, surrogate = (needs(f"spikingjelly.activation_based.{name}") for name in ("neuron", "surrogate"))
    layer, functional = (needs(f"spikingjelly.activation_based.{name}") for name in ("layer", "functional"))
    surrogates = (surrogate.ATan(2.0), surrogate.Sigmoid(4.0), surrogate.PiecewiseQuadratic(1.5), surrogate.Rect(0.7))
    for shape, reset, detached in itertools.product(surrogates, (0.0, None), (False, True)):
        common = dict(v_reset=reset, surrogate_function=shape, detach_reset=detached, step_mode="m")
        nodes = [
            sj.LIFNode(tau=2.0, decay_input=True, v_threshold=0.5, **common),
            sj.LIFNode(tau=4 / 3, decay_input=False, **common),
            sj.IFNode(v_threshold=0.75, **common),
        ]
        for node in nodes:
            ours = LIF.from_spikingjelly(node)
            x = grid(T, 4, 96)
            if not isinstance(shape, surrogate.Rect):  # on a grid a membrane can meet the rectangle's edge
                assert_same(lambda x, node=node: (functional.reset_net(node), node(x))[1], ours, x)
            assert_same(lambda x, node=node: (functional.reset_net(node), node(x))[1], ours, torch.randn(T, 4, 96))
            back = ours.to_spikingjelly()
            assert_same(lambda x, node=back: (functional.reset_net(node), node(x))[1], ours, torch.randn(T, 4, 96))
    torch.manual_seed(1)
    network = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, step_mode="m"),
        sj.LIFNode(step_mode="m", surrogate_function=surrogate.ATan()),
        layer.Conv2d(8, 4, 3, step_mode="m"),
        sj.ParametricLIFNode(decay_input=False, v_threshold=0.3, step_mode="m"),
    )
    swapped = nn.Sequential(*[LIF.from_spikingjelly(m) if isinstance(m, sj.BaseNode) else m for m in network])
    assert_same(lambda x: (functional.reset_net(network), network(x))[1], swapped, torch.randn(T, 2, 2, 9, 9) * 2)
    plif = swapped[3]
    assert plif.learned.decay_logit.grad != 0 and not plif.learned.threshold_raw.requires_grad


def test_what_is_frozen_or_wide_stays_so(needs) -> None:
    """A frozen parameter is not thawed, and float64 is not rounded to float32."""
    sj, snn = needs("spikingjelly.activation_based.neuron"), needs("snntorch")
    node = sj.ParametricLIFNode(init_tau=3.7, decay_input=False, step_mode="m").double()
    ours = LIF.from_spikingjelly(node)
    assert ours.learned.decay.item() == pytest.approx(1.0 - node.w.sigmoid().item(), rel=1e-14)
    node.w.requires_grad_(False)
    cell = snn.Leaky(beta=0.5, threshold=0.8, reset_mechanism="zero", learn_beta=True, learn_threshold=True)
    cell.beta.requires_grad_(False)
    frozen = LIF.from_spikingjelly(node).learned, LIF.from_snntorch(cell).learned
    assert [p.requires_grad for p in frozen[0].parameters()] == [False, False]
    assert [p.requires_grad for p in frozen[1].parameters()] == [False, True]


def test_what_spikingjelly_has_beyond_is_named(needs) -> None:
    sj, surrogate = (needs(f"spikingjelly.activation_based.{name}") for name in ("neuron", "surrogate"))
    for node, message in (
        (nn.ReLU(), "IFNode, LIFNode or ParametricLIFNode, got ReLU"),
        (sj.LIFNode(), "step_mode='m', got 's'"),
        (sj.LIFNode(step_mode="m", v_reset=0.1), "v_reset 0.0 or None, got 0.1"),
        (sj.LIFNode(step_mode="m", tau=3.0), "power of two with decay_input=True, got 3"),
        (sj.ParametricLIFNode(step_mode="m"), "decay_input=False of a ParametricLIFNode"),
        (sj.LIFNode(step_mode="m", surrogate_function=surrogate.Erf()), "a surrogate out of .* got Erf"),
        (sj.LIFNode(step_mode="m", store_v_seq=True), "store_v_seq=False"),
    ):
        with pytest.raises(ValueError, match=message):
            LIF.from_spikingjelly(node)
    with pytest.raises(ValueError, match="a decay above 0"):
        LIF(LIFSpec(decay=0.0)).to_spikingjelly()
    with pytest.raises(ValueError, match="num_steps=None"):
        LIF(num_steps=4).to_spikingjelly()
    with pytest.raises(ValueError, match="one decay and threshold a layer"):
        LIF(learnable="channel", channels=3).to_spikingjelly()
    learned = LIF(IMAGENET, learnable="layer").to_spikingjelly()
    assert learned.tau == pytest.approx(4 / 3)


def test_a_network_of_snntorch(needs) -> None:
    snn, surrogate = needs("snntorch"), needs("snntorch.surrogate")

    def looped(cell, x):
        membrane, spikes = cell.reset_mem(), []
        for current in x:
            spike, membrane = cell(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    for grad, delay in itertools.product((None, surrogate.atan(1.5), surrogate.sigmoid(6)), (False, True)):
        cell = snn.Leaky(beta=0.7, threshold=0.6, reset_mechanism="zero", spike_grad=grad, reset_delay=delay)
        assert_same(lambda x, cell=cell: looped(cell, x), LIF.from_snntorch(cell), torch.randn(T, 4, 96))
    cell = snn.Leaky(beta=0.5, reset_mechanism="zero", learn_beta=True)
    ours = LIF.from_snntorch(cell)
    linear = nn.Linear(12, 20)
    assert_same(lambda x: looped(cell, linear(x)), lambda x: ours(linear(x)), torch.randn(T, 4, 12) * 4)
    # the same derivative: theirs at beta itself, ours through a sigmoid
    torch.testing.assert_close(cell.beta.grad * 0.25, ours.learned.decay_logit.grad[0])
    assert ours.learned.threshold_raw.grad is None
    for other, message in (
        (snn.Leaky(beta=0.5), "reset_mechanism='zero', got 'subtract'"),
        (snn.Leaky(beta=torch.rand(3), reset_mechanism="zero"), "one beta a layer, got 3"),
        (snn.Leaky(beta=0.5, reset_mechanism="zero", spike_grad=surrogate.fast_sigmoid()), "got fast_sigmoid"),
        (snn.Leaky(beta=0.5, reset_mechanism="zero", inhibition=True), "inhibition=False, got True"),
        (snn.Synaptic(alpha=0.5, beta=0.5), "Leaky, got Synaptic"),
    ):
        with pytest.raises(ValueError, match=message):
            LIF.from_snntorch(other)
