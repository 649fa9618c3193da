"""The encoders against the plain formula, and hoisting against repetition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import CIFAR, IMAGENET, LIFSpec, lif_reference
from timm_gac.layers.encoder import (
    GATES,
    DirectCoding,
    GatedAttentionCoding,
    SpatialChannelAttention,
    TemporalAttention,
)
from timm_gac.layers.lif import LIF
from timm_gac.layers.neuron import BatchNormLIF
from timm_gac.layers.parameter_groups import parameter_groups

T, B, C, H, W = 4, 3, 6, 5, 7
SPECS = pytest.mark.parametrize("spec", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])


def frames(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder_of(spec: LIFSpec = CIFAR, num_steps: int = T) -> GatedAttentionCoding:
    torch.manual_seed(1)
    encoder = GatedAttentionCoding(C, num_steps, spec, dtype=torch.float64)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def plain_gac(encoder: GatedAttentionCoding, x: Tensor) -> Tensor:
    """The formula frame by frame on ``(T, B, C, H, W)``, with PyTorch's own pools and 'same' convolutions."""
    steps = []
    average = torch.stack([F.adaptive_avg_pool3d(frame, 1).flatten() for frame in x], dim=1)
    maximum = torch.stack([F.adaptive_max_pool3d(frame, 1).flatten() for frame in x], dim=1)
    fc1, fc2 = encoder.temporal.fc1.weight, encoder.temporal.fc2.weight
    m = (average @ fc1.T).relu() @ fc2.T + (maximum @ fc1.T).relu() @ fc2.T
    for t, frame in enumerate(x):
        n = F.conv2d(frame, encoder.spatial.conv_a.weight, padding="same").relu()
        n = F.conv2d(n, encoder.spatial.conv_b.weight, padding="same")
        steps.append(torch.sigmoid(m[:, t, None, None, None] * n))
    return torch.stack(steps) * lif_reference(x, encoder.spec)


@SPECS
@pytest.mark.parametrize("static", [True, False], ids=["image", "frames"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_gac_is_the_formula(spec: LIFSpec, static: bool) -> None:
    encoder = encoder_of(spec)
    x = frames(B, C, H, W) if static else frames(T, B, C, H, W)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    actual = encoder(inputs[0])
    grad = frames(T, B, C, H, W, seed=2)
    actual.backward(grad)
    grads = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    expected = plain_gac(encoder, inputs[1].expand(T, -1, -1, -1, -1) if static else inputs[1])
    expected.backward(grad)
    assert 0.05 < (expected > 0).double().mean() < 0.95
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
    for name, parameter in encoder.named_parameters():
        message = f"gradient of {name}"
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=message)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_hoisting_equals_repetition(train: bool) -> None:
    """One stem pass on the image, or one on every repeated frame: same outputs, gradients and running mean."""
    torch.manual_seed(0)
    encoder, results = encoder_of(), []
    image = frames(B, 3, H, W)
    for hoisted in (True, False):
        torch.manual_seed(5)
        stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)).double().train(train)
        encoder.zero_grad()
        x = image.clone().requires_grad_()
        folded = stem(x if hoisted else x.repeat(T, 1, 1, 1))
        y = encoder(folded if hoisted else folded.unflatten(0, (T, B)))
        y.backward(frames(T, B, C, H, W, seed=2))
        grads = {f"stem.{n}": p.grad for n, p in stem.named_parameters()} | {"x": x.grad}
        grads |= {n: p.grad.clone() for n, p in encoder.named_parameters()}
        results.append((y, grads, stem[1]))
    (y, grads, norm), (y_repeated, grads_repeated, norm_repeated) = results
    torch.testing.assert_close(y, y_repeated, rtol=1e-11, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_repeated[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(norm.running_mean, norm_repeated.running_mean, rtol=1e-12, atol=1e-14)
    if train:  # the batch's part of the running variance carries the unbiased factor n / (n - 1)
        n = B * H * W
        factor = (n / (n - 1)) / (T * n / (T * n - 1))
        kept = 0.9
        expected = kept + (norm_repeated.running_var - kept) * factor
        torch.testing.assert_close(norm.running_var, expected, rtol=1e-10, atol=1e-12)


def test_convolutions_and_pools_run_once_for_an_image() -> None:
    encoder, shapes = encoder_of(), []
    encoder.spatial.conv_a.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    encoder(frames(B, C, H, W))
    encoder(frames(T, B, C, H, W))
    assert shapes == [(B, C), (T * B, C)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_pools_are_taken_in_float32(dtype: torch.dtype) -> None:
    encoder = encoder_of().to(dtype)
    seen = []
    encoder.temporal.register_forward_pre_hook(lambda module, args: seen.append(args))
    stem = (8 + frames(2, C, 64, 64)).to(dtype)
    y = encoder(stem)
    average, maximum = seen[0]
    torch.testing.assert_close(average[:, 0], stem.double().mean((1, 2, 3)).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(maximum[:, 0], stem.double().amax((1, 2, 3)).to(dtype), rtol=0, atol=0)
    assert y.dtype == dtype


@pytest.mark.parametrize("num_steps,hidden", [(1, 1), (2, 1), (3, 1), (6, 3)])
def test_temporal_attention_by_hand(num_steps: int, hidden: int) -> None:
    attention = TemporalAttention(num_steps)
    nn.init.constant_(attention.fc1.weight, 0.5), nn.init.constant_(attention.fc2.weight, 2.0)
    out = attention(torch.ones(2, num_steps), torch.full((2, num_steps), -1.0))  # relu removes the second term
    torch.testing.assert_close(out, torch.full((2, num_steps), hidden * num_steps * 0.5 * 2.0))


def test_spatial_attention_pads_one_before_and_two_after() -> None:
    attention = SpatialChannelAttention(1)
    nn.init.zeros_(attention.conv_a.weight), nn.init.zeros_(attention.conv_b.weight)
    attention.conv_a.weight.data[0, 0, 0, 0] = 1.0  # reads the pixel one up and one left
    attention.conv_b.weight.data[0, 0, 3, 3] = 1.0  # reads the pixel two down and two right
    x = torch.rand(1, 1, 5, 6)
    expected = torch.zeros_like(x)
    expected[..., :3, :4] = x[..., 1:4, 1:5]
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=0)


def test_direct_coding_repeats_without_a_copy() -> None:
    image, coding = frames(B, C, H, W), DirectCoding(T)
    torch.testing.assert_close(coding(image), image.repeat(T, 1, 1, 1, 1), rtol=0, atol=0)
    assert coding(image).data_ptr() == image.data_ptr()
    sequence = frames(T, B, C, H, W)
    assert coding(sequence) is sequence


def test_direct_coding_keeps_channels_last() -> None:
    coding, weight = DirectCoding(T), frames(T * B, C, H, W)
    image = frames(B, C, H, W).requires_grad_()
    (expected,) = torch.autograd.grad((coding(image).flatten(0, 1) * weight).sum(), image)
    image = image.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    folded = coding(image).flatten(0, 1)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(folded, image.repeat(T, 1, 1, 1), rtol=0, atol=0)
    (grad,) = torch.autograd.grad((folded * weight).sum(), image)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("module", [encoder_of(), DirectCoding(T)], ids=["gac", "direct"])
def test_wrong_inputs_say_what_was_expected(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected num_steps=4 frames on axis 0.*got 3"):
        module(frames(3, B, C, H, W))
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)"):
        module(frames(C, H, W))


def test_wrong_arguments_say_what_was_expected() -> None:
    for wrong in (0, 2.5, None):
        with pytest.raises(ValueError, match="num_steps"):
            GatedAttentionCoding(C, wrong)
        with pytest.raises(ValueError, match="num_steps"):
            DirectCoding(wrong)
    with pytest.raises(ValueError, match="reduction"):
        TemporalAttention(4, reduction=0)
    with pytest.raises(ValueError, match="expected 6 channels, got 5"):
        encoder_of()(frames(B, 5, H, W))


def test_every_hidden_unit_of_the_temporal_attention_is_alive() -> None:
    """On a static image: where all frames have one positive maximum."""
    for seed in range(20):
        torch.manual_seed(seed)
        attention = GatedAttentionCoding(2, num_steps=4).temporal
        pooled = torch.full((1, 4), 3.0)
        assert (attention.fc1(pooled) >= 0).all()
        attention(torch.zeros(1, 4), pooled).square().sum().backward()
        assert attention.fc1.weight.grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("static", [True, False], ids=["image", "frames"])
@pytest.mark.parametrize("gate", GATES)
def test_gates_with_less_attention(gate: str, static: bool) -> None:
    torch.manual_seed(0)
    encoder = GatedAttentionCoding(C, T, dtype=torch.float64, gate=gate)
    x = torch.randn((2, C, 5, 6) if static else (T, 2, C, 5, 6), dtype=torch.float64) + 0.5
    frames = x.expand(T, 2, C, 5, 6) if static else x
    spikes = lif_reference(frames, CIFAR)
    ones = torch.ones((), dtype=torch.float64)
    pools = frames.mean((2, 3, 4)).t(), frames.amax((2, 3, 4)).t()
    m = encoder.temporal(*pools).t()[:, :, None, None, None] if gate in ("full", "temporal") else ones
    n = encoder.spatial(frames.flatten(0, 1)).view_as(frames) if gate in ("full", "spatial") else ones
    level = {"half": 0.5 * ones, "open": ones}.get(gate, (m * n).sigmoid())
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), level * spikes)
        coded, fired = encoder.encode_and_fire(x)
        torch.testing.assert_close(coded, level * spikes)
        assert torch.equal(fired, lif_reference(coded, CIFAR))
    parts = {name.split(".")[0] for name in encoder.state_dict()}
    assert parts == {"full": {"temporal", "spatial"}}.get(gate, {gate} - {"half", "open"})


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected gate out of full, spatial, .* got 'none'"):
        GatedAttentionCoding(C, T, gate="none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": -1}, "channels as an integer >= 1, got -1"),
        ({"channels": "8"}, "channels as an integer >= 1, got '8'"),
        ({"channels": 8.0}, "channels as an integer >= 1, got 8.0"),
        ({"reduction": 1.5}, "reduction as an integer >= 1, got 1.5"),
        ({"reduction": None}, "reduction as an integer >= 1, got None"),
        ({"gate": ["full"]}, "expected gate out of"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedAttentionCoding(**({"channels": 8, "num_steps": 4} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [None, [1.0], np.zeros((4, 8, 3, 3), np.float32)], ids=["none", "list", "numpy"])
def test_what_is_no_tensor_is_refused_by_every_layer(x: object) -> None:
    encoder = GatedAttentionCoding(8, np.int64(4))
    for layer in (encoder, DirectCoding(4), LIF(num_steps=4), BatchNormLIF(8, num_steps=4)):
        with pytest.raises(ValueError, match="to be a tensor, got"):
            layer(x)


def test_neurons_refuse_a_number_and_a_drop_path_that_is_none() -> None:
    with pytest.raises(ValueError, match="got a number without axes"):
        LIF(num_steps=4)(torch.tensor(1.0))
    with pytest.raises(ValueError, match="expected drop_path in"):
        BatchNormLIF(8, drop_path="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", ["a", None, True, float("inf"), float("nan"), -1])
def test_weight_decay_is_a_finite_number(decay: object) -> None:
    with pytest.raises(ValueError, match="expected weight_decay of at least 0, got"):
        parameter_groups(DirectCoding(4), decay)  # type: ignore[arg-type]


def test_weight_decay_wants_the_network_itself() -> None:
    with pytest.raises(ValueError, match="give the module, not its parameters"):
        parameter_groups(encoder_of().parameters(), 1e-4)  # type: ignore[arg-type]
