"""int8_conv2d: forward to the bit and both gradients against the definition, and what shows or is refused."""

from __future__ import annotations

import pytest
import torch

from gac_kernels import int8_conv2d, int8_conv2d_reference, int8_weight, pack_spikes
from gac_kernels.reference import int8_conv2d_gradients_reference
from gac_kernels.reference.int8_conv2d import gradient_scale

T = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(dtype, device, stride=1, layout=torch.channels_last):
    spikes = (torch.rand(T * 2, 5, 6, 7, device=device) < 0.3).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(6, 5, 3, 3, device=device) * torch.logspace(-3, 2, 6, device=device)[:, None, None, None]
    grad = torch.randn(T * 2, 6, -(-6 // stride), -(-7 // stride), device=device).to(dtype) * 1e-4
    return spikes.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_definition(dtype, stride, layout, device):
    spikes, weight, grad = inputs(dtype, device, stride, layout)
    out = int8_conv2d(spikes, weight, stride)
    assert torch.equal(out, int8_conv2d_reference(spikes, weight, stride))
    assert out.is_contiguous(memory_format=layout)
    found = torch.autograd.grad(out, (spikes, weight), grad)
    expected = int8_conv2d_gradients_reference(grad, spikes, weight, stride)
    for actual, wanted, rounding in zip(found, expected, (torch.finfo(dtype).eps, 1e-6), strict=True):
        assert (actual - wanted).norm() <= (rounding + 1e-6) * wanted.norm()
    assert found[0].dtype == dtype and found[1].dtype == torch.float32

    bits = pack_spikes(spikes, T)
    if stride == 2:  # in memory with gaps
        bits = torch.stack((bits, 255 - bits), -1)[..., 0]
    packed = int8_conv2d(spikes, weight, stride, bits=bits, num_steps=T)
    again = torch.autograd.grad(packed, (spikes, weight), grad)
    assert torch.equal(packed, out) and all(map(torch.equal, again, found))


def test_gradients_round_to_eight_bits_and_no_more(device):
    spikes, weight, grad = inputs(torch.float32, device)
    weight = torch.randn_like(weight).requires_grad_()
    exact = torch.nn.functional.conv2d(spikes, weight, padding=1)
    expected = torch.autograd.grad(exact, (spikes, weight), grad)
    found = torch.autograd.grad(int8_conv2d(spikes, weight), (spikes, weight), grad)
    for actual, wanted in zip(found, expected, strict=True):
        error = (actual - wanted).norm() / wanted.norm()
        assert 1e-3 < error < 0.1


def test_integers_times_scale_are_themselves_again(device):
    weight = torch.randn(64, 8, 3, 3, device=device) * torch.logspace(-28, 30, 64, device=device)[:, None, None, None]
    weight[3] = 0.0
    integers, scale = int8_weight(weight)
    product = integers * scale[:, None, None, None]
    assert (integers.double() * scale.double()[:, None, None, None]).equal(product.double()), "not exact"
    assert integers[weight != 0].abs().max() == 127 and not integers[3].any()
    assert all(map(torch.equal, int8_weight(product), (integers, scale)))
    rounded = (product - weight).abs() / weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    assert rounded.max() <= 0.5001 / 127


def test_what_is_not_finite_shows(device):
    spikes, weight, grad = inputs(torch.float32, device)
    broken = weight.detach().clone()
    broken[2, 0, 0, 0] = torch.nan
    assert int8_conv2d(spikes, broken)[:, 2].isnan().all() and not int8_conv2d(spikes, broken)[:, 3].isnan().any()
    for value in (torch.inf, torch.nan):
        grad[0, 0, 0, 0] = value
        for gradient in torch.autograd.grad(int8_conv2d(spikes, weight), (spikes, weight), grad):
            assert gradient.isnan().all()
    zero = torch.autograd.grad(int8_conv2d(spikes, weight), (spikes, weight), torch.zeros_like(grad))
    assert not any(gradient.any() for gradient in zero)


def test_second_derivatives_and_transforms_are_refused(device):
    spikes, weight, _ = inputs(torch.float32, device)
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        torch.autograd.grad(int8_conv2d(spikes, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        torch.func.grad(lambda w: int8_conv2d(spikes.detach(), w).sum())(weight.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 3}, "stride 1 or 2"),
        ({"weight": torch.zeros(4, 3, 3, 3)}, "3x3 convolution"),
        ({"weight": torch.zeros(4, 5, 3, 3, dtype=torch.int8)}, "expected weight in one of"),
        ({"bits": torch.zeros(1, dtype=torch.uint8)}, "expected bits as uint8"),
        ({"spikes": torch.zeros(8, 5, 6)}, "4 axes"),
    ],
)
def test_wrong_arguments(change, message):
    spikes, weight, _ = inputs(torch.float32, "cpu")
    given = {"spikes": spikes, "weight": weight, "stride": 1, "num_steps": T} | change
    with pytest.raises(ValueError, match=message):
        int8_conv2d(**given)


def test_autocast_rounds_no_sum(device):
    spikes = (torch.rand(2, 64, 6, 7, device=device) < 0.5).float()
    weight = torch.randn(6, 64, 3, 3, device=device)
    with torch.autocast(spikes.device.type, torch.bfloat16):
        out = int8_conv2d(spikes, weight)
    assert torch.equal(out, int8_conv2d_reference(spikes, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradients_scale_is_a_power_of_two(dtype, device):
    largest = torch.tensor([448.0, 448.1, 447.9, 3e-5, 1.0, 2.0**-112, 2.0**112], dtype=dtype, device=device)
    scales = torch.stack([gradient_scale(x) for x in largest])
    assert scales.dtype == dtype and (torch.frexp(scales).mantissa == 0.5).all()
    assert ((scales * largest <= 448) & (2 * scales * largest > 448)).all()


def test_op_registration(device):
    spikes, weight, _ = inputs(torch.float32, device)
    bits = pack_spikes(spikes, T)
    for args in ((spikes, weight, 2, None, 1), (spikes, weight, 1, bits, T)):
        torch.library.opcheck(torch.ops.gac_kernels.int8_conv2d.default, args)
