"""Noise on the current of neurons: its size in units of the threshold, where it goes, and that nothing else moves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import CIFAR, IMAGENET, LIFSpec, lif_reference, pack_spikes
from timm_gac.layers.encoder import GatedAttentionCoding
from timm_gac.layers.neuron import LIF, BatchNormLIF, MembraneBatchNormLIF
from timm_gac.layers.noise import draw_noise

T, B, C, H, W = 3, 4, 5, 6, 7
SHARE = 0.3
STEP = LIFSpec(threshold=0.8, decay=0.0)  # of which every step is one of its own


def watch(module: nn.Module) -> None:
    """Modules with hooks are called one by one."""
    module.register_forward_hook(lambda *_: None)


def noisy(module: Any, share: float = SHARE) -> Any:
    for layer in module.modules():
        if isinstance(layer, (LIF, GatedAttentionCoding)):
            layer.current_noise = share
    return module.train()


def check_rate(spikes: Tensor, distance: float) -> None:
    """Share of neurons that fire, at a current so many deviations below the threshold, within 4 of its own."""
    expected = 0.5 * math.erfc(distance / math.sqrt(2.0))
    tolerance = 4.0 * math.sqrt(expected * (1.0 - expected) / spikes.numel())
    assert abs(float((spikes != 0).double().mean()) - expected) < tolerance


PATHS = ("alone", "residual", "pair", "watched", "dropping", "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("learnable", [None, "layer", "channel"])
@pytest.mark.parametrize("path", PATHS)
def test_its_deviation_is_a_share_of_the_threshold(path: str, learnable: str | None, dtype: torch.dtype) -> None:
    """The norm's output is its bias, 0.1 thresholds below the threshold: how many fire says how large the noise is."""
    torch.manual_seed(0)
    kind = MembraneBatchNormLIF if path == "pair" else BatchNormLIF
    spec = LIFSpec(threshold=0.8, decay=0.5)  # the one step has no past
    parameters = dtype if dtype == torch.float64 else torch.float32
    drop_path = 1e-9 if path == "dropping" else 0.0
    layer = noisy(kind(C, spec, 1, drop_path=drop_path, dtype=parameters, learnable=learnable))
    threshold = torch.full((C,), spec.threshold)
    if learnable is not None:
        assert layer.learned is not None
        threshold = torch.linspace(0.5, 2.0, C) if learnable == "channel" else torch.full((C,), 1.5)
        learned = threshold if learnable == "channel" else threshold[:1]
        layer.learned.set_values(torch.full_like(learned, 0.5), learned)
    nn.init.zeros_(layer.weight), layer.bias.data.copy_(0.9 * threshold)
    x = torch.randn(20, C, 16, 16).to(dtype)
    residual = torch.zeros_like(x) if path in ("residual", "pair") else None
    if path == "watched":
        watch(layer.lif)
    membrane, spikes, bits = layer.norm_and_fire(x, residual, 1, path == "pair", path == "packed")
    assert spikes.dtype == dtype
    # In 16 bits the current is rounded where it is returned or norm and neuron run one by one.
    current = (0.9 * threshold).to(dtype) if dtype.itemsize == 2 and path != "alone" else 0.9 * threshold
    for channel, value in enumerate(current.double()):
        at = float(threshold[channel])
        check_rate(spikes[:, channel], (at - float(value)) / (SHARE * at))
    if path == "pair":
        assert torch.equal(membrane, (layer.bias[:, None, None] + torch.zeros_like(x)).to(dtype))  # without noise
    if path == "packed":
        assert torch.equal(bits, pack_spikes(spikes, 1))


@pytest.mark.parametrize("learnable", [None, "layer", "channel"])
@pytest.mark.parametrize("spec", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
@pytest.mark.parametrize("shortcut", ["none", "identity", "norm"])
@pytest.mark.parametrize("pair", [False, True], ids=["spikes", "pair"])
def test_it_is_batch_norm_plus_noise_into_the_neuron(
    pair: bool, shortcut: str, spec: LIFSpec, learnable: str | None
) -> None:
    """Spikes, membrane, every gradient and the running statistics, against plain PyTorch with the same noise."""
    torch.manual_seed(0)
    kind = MembraneBatchNormLIF if pair else BatchNormLIF
    layer = noisy(kind(C, spec, T, dtype=torch.float64, learnable=learnable))
    nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    norms = [nn.BatchNorm2d(C, dtype=torch.float64) for _ in range(2)]
    inputs = [torch.randn(T * B, C, H, W, dtype=torch.float64) for _ in range(1 + (shortcut != "none"))]
    grads = [torch.randn(T * B, C, H, W, dtype=torch.float64) for _ in range(2)]
    plain = copy.deepcopy(layer)

    given = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(7)
    residual = given[1] if shortcut != "none" else None
    norm = norms[0] if shortcut == "norm" else None
    membrane, spikes, _ = layer.norm_and_fire(given[0], residual, T, pair, residual_norm=norm)
    torch.autograd.backward([spikes, membrane][: 1 + pair], grads[: 1 + pair])

    twins = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(7)
    running = (plain.running_mean, plain.running_var)
    expected = F.batch_norm(twins[0], *running, plain.weight, plain.bias, True, 0.1, plain.eps)
    if shortcut != "none":
        expected = expected + (norms[1](twins[1]) if shortcut == "norm" else twins[1])
    noise = draw_noise(plain.lif, inputs[0], axis=1)
    learned = {} if plain.learned is None else plain.learned.named()
    fired = lif_reference((expected + noise).unflatten(0, (T, B)), spec, **learned).flatten(0, 1)
    torch.autograd.backward([fired, expected][: 1 + pair], grads[: 1 + pair])

    assert torch.equal(spikes, fired)
    clean = lif_reference(expected.unflatten(0, (T, B)), spec, **learned).flatten(0, 1)
    assert (fired != clean).double().mean() > 0.02
    if pair:
        torch.testing.assert_close(membrane, expected)
    assert sum(parameter.requires_grad for parameter in layer.parameters()) == 2 + 2 * (learnable is not None)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, msg=lambda m, n=name: f"{n}: {m}")
    for mine, other in zip(given, twins, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name), getattr(plain, name))
    if shortcut == "norm":
        torch.testing.assert_close(norms[0].weight.grad, norms[1].weight.grad)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", ["norm", "watched", "neuron", "encoder_image", "encoder_frames"])
def test_elements_and_steps_are_independent(layer: str, channels_last: bool) -> None:
    """At the threshold half fire; of neighbours in any axis, and of two draws, a quarter fire together."""
    torch.manual_seed(0)
    steps, batch, channels, side = 4, 8, 8, 16
    image = layer == "encoder_image"
    shape = (batch if image else steps * batch, channels, side, side)
    x = torch.full(shape, STEP.threshold, dtype=torch.float32)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    if layer.startswith("encoder"):
        encoder = noisy(GatedAttentionCoding(channels, steps, STEP))
        draw = lambda: encoder(x if image else x.unflatten(0, (steps, batch)))  # noqa: E731
    elif layer == "neuron":
        neuron = noisy(LIF(STEP, steps))
        draw = lambda: neuron(x).unflatten(0, (steps, batch))  # noqa: E731
    else:
        norm = noisy(BatchNormLIF(channels, STEP, steps))
        nn.init.zeros_(norm.weight), nn.init.constant_(norm.bias, STEP.threshold)
        if layer == "watched":
            watch(norm.lif)
        draw = lambda: norm(x).unflatten(0, (steps, batch))  # noqa: E731
    first, second = (draw().detach() != 0 for _ in range(2))
    assert first.shape == (steps, batch, channels, side, side)
    check_rate(first, 0.0)
    for axis in range(5):
        both = first & first.roll(1, axis)
        assert abs(float(both.double().mean()) - 0.25) < 0.01, axis
    assert abs(float((first & second).double().mean()) - 0.25) < 0.01


def test_the_encoder_gates_noisy_spikes_by_scores_without_noise() -> None:
    torch.manual_seed(0)
    encoder = GatedAttentionCoding(C, T, CIFAR)
    stem = (1.0 + torch.randn(B, C, H, W)).requires_grad_()
    clean = encoder(stem)
    found = noisy(encoder, 0.5)(stem)
    both = (clean != 0) & (found != 0)
    assert both.double().mean() > 0.1 and ((clean != 0) != (found != 0)).double().mean() > 0.05
    torch.testing.assert_close(found[both], clean[both])
    torch.manual_seed(7)
    first = encoder(stem)
    (grad,) = torch.autograd.grad(first.sum(), stem)
    torch.manual_seed(7)
    frames = stem.expand(T, *stem.shape) + draw_noise(encoder, torch.empty(T, B, C, H, W), axis=2)
    spatial, temporal = encoder._scores(stem)
    expected = lif_reference(frames, CIFAR) * torch.sigmoid(temporal.t()[:, :, None, None, None] * spatial)
    torch.testing.assert_close(first, expected)
    (own,) = torch.autograd.grad(expected.sum(), stem)
    torch.testing.assert_close(grad, own)


def test_a_learned_threshold_gets_no_gradient_from_its_noise() -> None:
    layer = LIF(CIFAR, T, learnable="channel", channels=C)
    layer.current_noise = SHARE
    noise = draw_noise(layer, torch.empty(T, B, C, H, W), axis=2)
    assert not noise.requires_grad and noise.std() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_draws_anew_at_each_replay() -> None:
    norm = noisy(BatchNormLIF(C, STEP, T)).cuda()
    nn.init.zeros_(norm.weight), nn.init.constant_(norm.bias, STEP.threshold)
    x = torch.randn(T * B, C, H, W, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        norm(x)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        spikes = norm(x)
    graph.replay()
    first = spikes.clone()
    graph.replay()
    check_rate(first, 0.0), check_rate(spikes, 0.0)
    assert not torch.equal(first, spikes)


@pytest.mark.parametrize("kind", [LIF, BatchNormLIF, GatedAttentionCoding])
def test_there_is_none_in_evaluation_or_at_0(kind: type) -> None:
    torch.manual_seed(0)
    layer = {
        LIF: lambda: LIF(CIFAR, T),
        BatchNormLIF: lambda: BatchNormLIF(C, CIFAR, T),
        GatedAttentionCoding: lambda: GatedAttentionCoding(C, T, CIFAR),
    }[kind]()
    x = torch.randn(T * B, C, H, W)
    state = torch.get_rng_state()
    for training, share in ((False, SHARE), (True, 0.0)):
        expected = copy.deepcopy(layer).train(training)(x)
        assert torch.equal(noisy(copy.deepcopy(layer), share).train(training)(x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisy(copy.deepcopy(layer))(x), layer.train()(x))
