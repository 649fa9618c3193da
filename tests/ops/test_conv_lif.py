"""conv_lif against convolution, bias, residual and neuron in float64: everywhere two passes, on Hopper one too."""

from __future__ import annotations

import pytest
import torch

from gac_kernels import CIFAR, IMAGENET, LIFSpec, conv_lif, spike_conv_reference, tuning
from gac_kernels.convolution.hopper import launch as hopper_conv
from test_hopper_conv import SHAPES, hopper

# A neuron whose current lies within the rounding of a dtype around the threshold may fire or not.
DIFFER = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ONE_PASS_DIFFER = 2e-4  # sums are in float32 there, and only their order is another


def inputs(shape, device, dtype, residual):
    """x, weight, bias and keywords of a call whose currents lie around the threshold."""
    num_steps, batch, channels, out_channels, height, width, stride = shape
    x = (torch.rand(num_steps * batch, channels, height, width, device=device) < 0.3).to(dtype)
    weight = (torch.randn(out_channels, channels, 3, 3, device=device) / (channels * 2.7) ** 0.5).to(dtype)
    bias = torch.randn(out_channels, device=device) * 0.3 + 0.3
    keywords = {"stride": stride}
    if residual:
        size = (num_steps * batch, out_channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
        keywords["residual"] = torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last
    return x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias, keywords


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions of float32 in float32, not in TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def compare(shape, device, dtype, residual, spec, differ):
    x, weight, bias, keywords = inputs(shape, device, dtype, residual)
    ones = torch.ones_like(bias)
    current, expected = spike_conv_reference(
        spikes=x,
        weight=weight,
        scale=ones,
        bias=bias,
        num_steps=shape[0],
        spec=spec,
        return_membrane=True,
        **keywords,
    )
    membrane, spikes = conv_lif(
        x=x,
        weight=weight,
        bias=bias,
        num_steps=shape[0],
        spec=spec,
        return_membrane=True,
        **keywords,
    )
    assert 0.02 < expected.double().mean() < 0.98
    assert spikes.dtype == membrane.dtype == dtype
    assert spikes.is_contiguous(memory_format=torch.channels_last)
    assert (spikes != expected).float().mean() <= differ
    assert (
        conv_lif(
            x=x,
            weight=weight,
            bias=bias,
            num_steps=shape[0],
            spec=spec,
            **keywords,
        )
        != expected
    ).float().mean() <= differ
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
    assert ((membrane - current).norm() / current.norm()).item() <= tolerance


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DIFFER, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 16, 24, 5, 7, 1), (3, 2, 32, 16, 6, 5, 2)], ids=["stride 1", "stride 2"])
def test_two_passes(shape, dtype, residual, device, poisoned):
    compare(
        shape=shape,
        device=device,
        dtype=dtype,
        residual=residual,
        spec=IMAGENET if shape[0] == 2 else CIFAR,
        differ=DIFFER[dtype],
    )


@pytest.fixture
def one_pass(request, monkeypatch, filled):
    """The calls of the Hopper kernels, which take every layer with these copies of pixels and steps."""
    yield from take_every_layer(monkeypatch, *request.param)


@pytest.fixture
def one_pass_everywhere(monkeypatch):
    """The same without the pretence that every call fills the GPU."""
    yield from take_every_layer(monkeypatch, 2, 1)


def take_every_layer(monkeypatch, copies, steps):
    config = {"COPIES": copies, "STEPS": steps, "ONE_PASS": 1}
    monkeypatch.setattr(tuning, "_device_configs", lambda _: {})
    monkeypatch.setitem(tuning.DEFAULTS, "conv_lif_hopper", config)
    tuning.shape_config.cache_clear()
    launched = []

    def note(plan, *arguments, run=hopper_conv.launch, **keywords):
        launched.append(plan)
        run(plan, *arguments, **keywords)

    monkeypatch.setattr(hopper_conv, "launch", note)
    yield launched
    assert not hopper_conv._refusals
    tuning.shape_config.cache_clear()


@hopper
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("one_pass", [(0, 1), (2, 1), (2, 2), (3, 1)], ids=str, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_pass(one_pass, shape, dtype, residual, device, poisoned):
    spec = IMAGENET if shape[0] == 3 else LIFSpec(reset="soft", decay=0.9) if shape[0] == 5 else CIFAR
    compare(
        shape=shape,
        device=device,
        dtype=dtype,
        residual=residual,
        spec=spec,
        differ=ONE_PASS_DIFFER,
    )
    assert len(one_pass) == 2


def side_by_side(x, weight, keywords, dtype, device):
    """Keywords with a shortcut of stride 2, and their spikes in float64."""
    size = (len(x), 64, *(2 * n for n in x.shape[2:]))
    residual = torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    shortcut = (torch.randn(len(weight), 64, 1, 1, device=device) / 8).to(dtype)
    return keywords | {"residual": residual, "shortcut": shortcut}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shortcut_in_two_passes(dtype, device, poisoned):
    x, weight, bias, keywords = inputs((2, 3, 16, 24, 5, 7, 1), device, dtype, False)
    keywords = side_by_side(
        x=x,
        weight=weight,
        keywords=keywords,
        dtype=dtype,
        device=device,
    )
    expected = spike_conv_reference(
        spikes=x,
        weight=weight,
        scale=torch.ones_like(bias),
        bias=bias,
        num_steps=2,
        **keywords,
    )
    assert (conv_lif(x, weight, bias, 2, **keywords) != expected).float().mean() <= DIFFER[dtype]


@hopper
@pytest.mark.parametrize("one_pass", [(2, 1), (3, 1)], ids=str, indirect=True)
def test_shortcut_in_one_pass(one_pass, device, poisoned):
    x, weight, bias, keywords = inputs((4, 3, 64, 128, 8, 16, 1), device, torch.bfloat16, False)
    keywords = side_by_side(
        x=x,
        weight=weight,
        keywords=keywords,
        dtype=torch.bfloat16,
        device=device,
    )
    expected = spike_conv_reference(
        spikes=x,
        weight=weight,
        scale=torch.ones_like(bias),
        bias=bias,
        num_steps=4,
        **keywords,
    )
    # The shortcut's sums are rounded to bfloat16, now and then to the other side.
    assert (conv_lif(x, weight, bias, 4, **keywords) != expected).float().mean() <= 3 * ONE_PASS_DIFFER
    assert len(one_pass) == 1


@hopper
def test_batches_too_small_for_one_pass_take_two(one_pass_everywhere, monkeypatch, device):
    x, weight, bias, keywords = inputs((4, 1, 128, 128, 16, 16, 1), device, torch.bfloat16, False)
    conv_lif(x, weight, bias, 4, **keywords)
    assert not one_pass_everywhere
    monkeypatch.setattr(hopper_conv, "multiprocessors", lambda _: 1)
    conv_lif(x, weight, bias, 4, **keywords)
    assert len(one_pass_everywhere) == 1


def test_registration_and_no_elements(device):
    x, weight, bias, keywords = inputs((2, 1, 8, 8, 3, 3, 2), device, torch.float32, True)
    for keep in (True, False):
        args = (x, weight, bias, keywords["residual"], 2, 2, 1.0, 0.5, False, keep)
        torch.library.opcheck(torch.ops.gac_kernels.conv_lif, args)
    assert conv_lif(x[:0], weight, bias, 2).shape == (0, 8, 3, 3)
    double = conv_lif(x.double(), weight.double(), bias.double(), 2)
    assert double.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 8, 1, 1)}, "3, 3"),
        ({"weight": torch.zeros(8, 8, 3, 3, dtype=torch.float16)}, "like x"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"num_steps": 3}, "fold time"),
        ({"stride": 3}, "stride 1 or 2"),
        ({"residual": torch.zeros(4, 8, 2, 2)}, "residual"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(4, 8, 3, 3), "weight": torch.zeros(8, 8, 3, 3), "bias": torch.zeros(8)}
    arguments |= {"num_steps": 2} | change
    with pytest.raises(ValueError, match=message):
        conv_lif(**arguments)
