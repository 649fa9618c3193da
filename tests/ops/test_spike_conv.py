"""spike_conv and integer_lif: every implementation gives the bits of the float32 definition, and float64's spikes."""

from __future__ import annotations

import pytest
import torch

from gac_kernels import CIFAR, IMAGENET, LIFSpec, integer_lif, lif, spike_conv, spike_conv_reference, use_backend
from gac_kernels.convolution.dispatch import Shape
from gac_kernels.reference import on_grid

# T, B, C, C', H, W, stride: odd sizes, channels that fill no tile, padding on every side, more than one block of each.
SHAPES = {
    "first": (2, 3, 64, 128, 5, 7, 1),
    "stride 2, odd": (3, 2, 32, 64, 7, 5, 2),
    "one pixel": (4, 5, 32, 32, 1, 1, 1),
    "partial channels": (2, 2, 24, 48, 4, 3, 2),
    "three of 32": (1, 2, 96, 160, 3, 3, 1),
    "wide": (2, 1, 160, 32, 3, 2, 1),
    "sixteen steps": (16, 1, 32, 32, 2, 3, 1),
}

GRID = 2.0**-15


@pytest.fixture(params=["eager", "triton", "auto"])  # auto is oneDNN on an x86 CPU
def backend(request):
    with use_backend(request.param):
        yield request.param


def inputs(shape, device, residual=None, grid=0.0):
    """Spikes, weight, scale, bias and keywords of a call whose currents lie around the threshold."""
    num_steps, batch, channels, out_channels, height, width, stride = shape
    spikes = (torch.rand(num_steps * batch, channels, height, width, device=device) < 0.3).to(torch.int8)
    weight = torch.randint(-127, 128, (out_channels, channels, 3, 3), device=device, dtype=torch.int8)
    scale = (torch.rand(out_channels, device=device) + 0.5) / (127 * (channels * 0.9) ** 0.5)
    bias = torch.randn(out_channels, device=device) * 0.3 + 0.3
    keywords = {"stride": stride, "grid": grid}
    if grid:
        scale, bias = on_grid(scale, grid), on_grid(bias, grid)
    if residual is not None:
        size = (num_steps * batch, out_channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
        values = torch.randn(size, device=device)
        keywords["residual"] = (values > 0).to(residual) if residual == torch.int8 else values.to(residual)
    layout = torch.channels_last
    return spikes.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), scale, bias, keywords


def with_shortcut(keywords, shape, shortcut_channels, shortcut_stride, dtype, device):
    """Keywords with a 1x1 shortcut in place of the residual, of numbers whose sums every order gives exactly."""
    num_steps, batch, _, out_channels, height, width, stride = shape
    size = [((n - 1) // stride + 1) * shortcut_stride for n in (height, width)]
    residual = torch.randint(-3, 4, (num_steps * batch, shortcut_channels, *size), device=device) / 4
    shortcut = torch.randint(-2, 3, (out_channels, shortcut_channels, 1, 1), device=device) / 16
    residual = residual.to(dtype).contiguous(memory_format=torch.channels_last)
    return keywords | {"residual": residual, "shortcut": shortcut.to(dtype)}


def borderline(shape, device, grid):
    """Operands and keywords of a call whose membranes lie as near to the threshold as the residual can bring them.

    With a grid they lie on the threshold or one step of the grid beside it, and the residual up to half a step off it.
    """
    *tensors, keywords = inputs(shape, device, None, grid)
    currents, _ = spike_conv_reference(*tensors, shape[0], return_membrane=True, **keywords)
    residuals, v = [], 0.0
    for current in currents.unflatten(0, (shape[0], -1)):
        target = CIFAR.threshold + grid * torch.randint(-1, 2, current.shape, device=device)
        added = on_grid(target - CIFAR.decay * v - current, grid).float().double()
        residuals.append(added + grid * (torch.rand_like(added) - 0.5) * 0.9)
        u = CIFAR.decay * v + current + added
        v = u * (u <= CIFAR.threshold)
    return *tensors, keywords | {"residual": torch.cat(residuals).float()}


def assert_membrane(membrane, expected, dtype, backend):
    """The float32 value rounded once to the dtype; Triton's interpreter cuts bfloat16 off where a GPU rounds it."""
    assert membrane.dtype == dtype
    if dtype == torch.bfloat16 and backend == "triton" and membrane.device.type == "cpu":
        expected = (expected.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(membrane, expected.to(dtype))


@pytest.mark.parametrize("residual", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_same_bits_as_the_definition(backend, shape, residual, device, poisoned):
    *tensors, keywords = inputs(shape, device, residual)
    spec = IMAGENET if shape[0] == 2 else CIFAR
    expected, spikes = spike_conv_reference(
        *tensors, shape[0], spec, return_membrane=True, dtype=torch.float32, **keywords
    )
    membrane, got = spike_conv(*tensors, shape[0], spec, return_membrane=True, **keywords)
    assert 0.02 < spikes.float().mean() < 0.98
    assert got.dtype == torch.int8 and torch.equal(got, spikes)
    assert_membrane(membrane, expected, residual or torch.float32, backend)
    assert torch.equal(spike_conv_reference(*tensors, shape[0], spec, **keywords), spikes)  # float64
    assert torch.equal(spike_conv(*tensors, shape[0], spec, **keywords), spikes)


@pytest.mark.parametrize("residual", [torch.float32, torch.float16, torch.int8], ids=str)
def test_residual_dtypes_and_soft_reset(backend, residual, device, poisoned):
    shape, spec = (3, 2, 32, 48, 3, 5, 1), LIFSpec(reset="soft", decay=0.9)
    *tensors, keywords = inputs(shape, device, residual)
    expected, spikes = spike_conv_reference(*tensors, 3, spec, return_membrane=True, dtype=torch.float32, **keywords)
    membrane, got = spike_conv(*tensors, 3, spec, return_membrane=True, **keywords)
    assert torch.equal(got, spikes)
    assert_membrane(membrane, expected, torch.float32 if residual == torch.int8 else residual, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shortcut_stride", [1, 2])
def test_shortcut(backend, shortcut_stride, dtype, device, poisoned):
    shape = (2, 3, 32, 48, 5, 3, 1)
    *tensors, keywords = inputs(shape, device, None, GRID)
    keywords = with_shortcut(
        keywords=keywords,
        shape=shape,
        shortcut_channels=24,
        shortcut_stride=shortcut_stride,
        dtype=dtype,
        device=device,
    )
    expected, spikes = spike_conv_reference(*tensors, 2, return_membrane=True, dtype=torch.float32, **keywords)
    membrane, got = spike_conv(*tensors, 2, return_membrane=True, **keywords)
    without = spike_conv(*tensors, 2, grid=GRID)
    assert torch.equal(got, spikes) and (got != without).float().mean() > 0.05
    assert_membrane(membrane, expected, dtype, backend)


def test_float32_and_float64_agree_on_a_million_neurons(device):
    """Only a neuron within a rounding of its threshold may differ, which is about one in ten million."""
    shape = (4, 4, 64, 128, 24, 22, 1)
    *tensors, keywords = inputs(shape, device, torch.float32)
    with use_backend("eager" if device.type == "cpu" else "auto"):
        got = spike_conv(*tensors, 4, **keywords)
    assert torch.equal(got, spike_conv_reference(*tensors, 4, **keywords))


@pytest.mark.parametrize("residual", [None, torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_on_a_grid_nothing_rounds(backend, residual, device, poisoned):
    shape = (4, 2, 24, 48, 5, 7, 1)
    *tensors, keywords = inputs(shape, device, residual, GRID)
    exact, spikes = spike_conv_reference(*tensors, 4, return_membrane=True, **keywords)
    membrane, got = spike_conv(*tensors, 4, return_membrane=True, **keywords)
    assert torch.equal(got, spikes) and 0.02 < spikes.float().mean() < 0.98
    assert torch.equal(exact.float().double(), exact)
    assert_membrane(membrane, exact.float(), torch.float32 if residual in (None, torch.int8) else residual, backend)


@pytest.mark.parametrize("shape", [(4, 2, 32, 48, 6, 5, 1), (3, 2, 64, 32, 7, 4, 2)], ids=["stride 1", "stride 2"])
def test_neurons_at_their_threshold_fire_as_in_float64(backend, shape, device, poisoned):
    for grid in (GRID, 2.0**-12):
        *tensors, keywords = borderline(shape, device, grid)
        exact = spike_conv_reference(*tensors, shape[0], **keywords)
        assert torch.equal(spike_conv(*tensors, shape[0], **keywords), exact)
        # The rounding decides here: without it many of them fire otherwise.
        without = spike_conv(*tensors, shape[0], **keywords | {"grid": 0.0})
        assert (without != exact).float().mean() > 0.1
    # Elsewhere than on a grid float32 cannot tell on which side of the threshold these neurons are.
    *tensors, keywords = borderline(shape, device, 0.0)
    differ = spike_conv(*tensors, shape[0], **keywords) != spike_conv_reference(*tensors, shape[0], **keywords)
    assert differ.float().mean() > 0.01


def test_rounding_to_a_grid(device):
    for dtype, largest in ((torch.float32, 2**22), (torch.float64, 2**51)):
        steps = (torch.rand(10_000, dtype=torch.float64, device=device) * 2 - 1) * largest
        steps = torch.cat((steps, torch.arange(-50, 50, device=device) / 2)).to(dtype)  # ties too, to even
        assert torch.equal(on_grid(steps * GRID, GRID), steps.round() * GRID)
    multiples = torch.arange(-(2**20), 2**20, device=device) * GRID
    for dtype in (torch.bfloat16, torch.float16):  # what is stored in 16 bits stays on the grid
        assert torch.equal(on_grid(multiples.to(dtype), GRID), multiples.to(dtype).float())


def test_largest_sums_are_exact(backend, device):
    spikes = torch.ones(2, 512, 3, 3, dtype=torch.int8, device=device)
    weight = torch.full((32, 512, 3, 3), 127, dtype=torch.int8, device=device)
    weight[1::2] = -128
    ones, zeros = torch.ones(32, device=device), torch.zeros(32, device=device)
    membrane, _ = spike_conv(
        spikes=spikes,
        weight=weight,
        scale=ones,
        bias=zeros,
        num_steps=1,
        return_membrane=True,
    )
    assert membrane[0, :2, 1, 1].tolist() == [127 * 4608, -128 * 4608]


def test_any_layout_and_no_elements(backend, device):
    *tensors, keywords = inputs((2, 2, 32, 32, 4, 5, 1), device, torch.float32)
    expected = spike_conv(*tensors, 2, **keywords)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    spikes, weight, scale, bias = tensors
    keywords["residual"] = keywords["residual"].contiguous()
    strided = torch.stack((spikes, spikes), -1)[..., 0]
    assert torch.equal(
        spike_conv(
            spikes=strided,
            weight=weight.contiguous(),
            scale=scale,
            bias=bias,
            num_steps=2,
            **keywords,
        ),
        expected,
    )
    keywords["residual"] = keywords["residual"][:0]
    assert spike_conv(
        spikes=spikes[:0],
        weight=weight,
        scale=scale,
        bias=bias,
        num_steps=2,
        **keywords,
    ).shape == (0, 32, 4, 5)


def test_registration(device):
    spec = (1.0, 0.5, False)
    *tensors, keywords = inputs((2, 1, 32, 32, 3, 3, 2), device, torch.bfloat16)
    for keep in (True, False):
        arguments = (*tensors, keywords["residual"], 2, 2, *spec, keep)
        torch.library.opcheck(torch.ops.gac_kernels.spike_conv, arguments)
        torch.library.opcheck(torch.ops.gac_kernels.spike_conv, (*arguments, GRID))
        torch.library.opcheck(
            torch.ops.gac_kernels.spike_conv, (*arguments, GRID, torch.ones(32, 32, 1, 1, device=device).bfloat16())
        )
    torch.library.opcheck(torch.ops.gac_kernels.integer_lif, (torch.randn(4, 3, 2, 2, device=device), 2, *spec))


def test_compiles_whole(device):
    *tensors, keywords = inputs((2, 1, 32, 32, 3, 3, 1), device, torch.float32, GRID)

    def both(residual):
        outputs = spike_conv(*tensors, 2, residual=residual, return_membrane=True, grid=GRID)
        return outputs, integer_lif(residual, 2)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(keywords["residual"])
    (membrane, spikes), encoded = both(keywords["residual"])
    assert torch.equal(compiled[0][0], membrane) and torch.equal(compiled[0][1], spikes)
    assert torch.equal(compiled[1], encoded)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_integer_lif_is_lif(backend, dtype, layout, device, poisoned):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 always runs as plain PyTorch")
    x = torch.randn(6, 5, 3, 4, device=device).to(dtype).contiguous(memory_format=layout) + 0.5
    spikes = integer_lif(x, 3, IMAGENET)
    assert spikes.dtype == torch.int8 and spikes.stride() == x.stride()
    assert torch.equal(spikes.to(dtype), lif(x.unflatten(0, (3, 2)), IMAGENET).flatten(0, 1))


def test_names_of_a_shape():
    assert Shape(
        channels=64,
        out_channels=128,
        height=32,
        width=32,
        stride=1,
        residual=False,
    ).keys() == ("64-128", "64-128@32x32")
    assert (
        Shape(
            channels=64,
            out_channels=128,
            height=16,
            width=16,
            stride=2,
            residual=True,
        ).keys()[-1]
        == "64-128:s2@16x16+res"
    )
    assert Shape(
        channels=64,
        out_channels=64,
        height=8,
        width=8,
        stride=1,
        residual=True,
        shortcut=True,
    ).keys()[-2:] == ("64-64+res+side", "64-64@8x8+res+side")


def test_errors(device):
    spikes, weight, scale, bias, _ = inputs((2, 1, 32, 16, 3, 3, 1), device)
    for changed, message in (
        ({"spikes": spikes.float()}, "spikes as int8"),
        ({"weight": weight.float()}, "weight as int8"),
        ({"weight": weight[:, :8]}, "3x3 convolution"),
        ({"scale": scale.double()}, "scale of shape"),
        ({"bias": bias[:3]}, "bias of shape"),
        ({"num_steps": 3}, "divides the first axis"),
        ({"shortcut": torch.ones(16, 8, 1, 1, device=device)}, "got none"),
        ({"shortcut": scale, "residual": spikes}, "the shortcut's torch.float32"),
        ({"shortcut": weight[:, :4, :1, :1].float(), "residual": spikes.float()}, "1x1 convolution's weight"),
        ({"shortcut": weight[:, :, :1, :1].float(), "residual": spikes.float()[..., :1]}, "the block's input"),
        ({"stride": 3}, "stride 1 or 2"),
        ({"residual": torch.zeros(2, 16, 2, 3, device=device)}, "residual of shape"),
        ({"residual": torch.zeros(2, 16, 3, 3, device=device).double()}, "residual of shape"),
        ({"spec": "cifar"}, "LIFSpec"),
        *(({"grid": grid}, "power of two") for grid in (0.3, 2.0, -0.5, 2.0**-25, float("nan"))),
    ):
        arguments = {"spikes": spikes, "weight": weight, "scale": scale, "bias": bias, "num_steps": 2} | changed
        with pytest.raises(ValueError, match=message):
            spike_conv(**arguments)
    many = torch.zeros(1, 20_000, 1, 1, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="lose bits"):
        spike_conv(
            spikes=many,
            weight=torch.zeros(1, 20_000, 3, 3, dtype=torch.int8, device=device),
            scale=scale[:1],
            bias=bias[:1],
            num_steps=1,
        )
    with pytest.raises(ValueError, match="divides the first axis"):
        integer_lif(torch.randn(3, 2, 2, 2, device=device), 2)
