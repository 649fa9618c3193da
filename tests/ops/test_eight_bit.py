"""Kernels that train in 8 bits: to the bit of the definition where nothing is added up in another order."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gac_kernels import CIFAR, IMAGENET, LIFSpec, batch_stats, int8_conv2d, int8_conv2d_reference, use_backend
from gac_kernels.common.launch import forget_launches
from gac_kernels.common.triton import INTERPRETED, tl, triton
from gac_kernels.convolution.hopper.plan import Plan
from gac_kernels.eight_bit import convolution, hopper, layer, norm, rounding
from gac_kernels.eight_bit.weight_gradient import turn, weight_gradient
from gac_kernels.eight_bit.weights import round_weight
from gac_kernels.reference import int8_conv2d_gradients_reference
from gac_kernels.reference.int8_conv2d import gradient_scale, int8_weight_reference, to_e4m3

CL = torch.channels_last
CUDA = torch.cuda.is_available()
ON_HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
RUNS = INTERPRETED or (CUDA and torch.cuda.get_device_capability() >= (8, 9))
pytestmark = pytest.mark.skipif(not RUNS, reason="needs float8 tensor cores or Triton's interpreter")
# The interpreter cuts bits off where a GPU rounds to bfloat16.
DTYPE = torch.bfloat16 if CUDA else torch.float32
SMALL = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# T, B, C, C', H, W, stride
SHAPES = [(4, 3, 40, 24, 5, 6, 1), (6, 2, 32, 48, 7, 6, 2), (4, 5, 20, 70, 4, 8, 2), (1, 6, 16, 16, 1, 1, 1)]


def close(found, expected, rounding=0.0):
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= rounding + 1e-6, error
    return error


def inputs(shape, device, layout=CL):
    T, B, C, N, H, W, stride = shape
    spikes = (torch.rand(T * B, C, H, W, device=device) < 0.3).to(DTYPE).contiguous(memory_format=CL)
    weight = torch.randn(N, C, 3, 3, device=device) * torch.logspace(-2, 1, N, device=device)[:, None, None, None]
    grad = torch.randn(T * B, N, (H - 1) // stride + 1, (W - 1) // stride + 1, device=device).to(DTYPE) * 1e-4
    return spikes, weight.contiguous(memory_format=layout), grad.contiguous(memory_format=CL)


def in_e4m3(grad, scale):
    """The gradient at the output as the definition rounds it, and its power of two."""
    h = grad.float() * scale[:, None, None]
    divisor = gradient_scale(h)
    return to_e4m3(h * divisor).contiguous(memory_format=CL), divisor.reshape(1)


@triton.jit
def _round(x_ptr, code_ptr, scale_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(code_ptr + i, rounding.e4m3_code(tl.load(x_ptr + i)))
    tl.store(scale_ptr, rounding.power_scale(tl.load(x_ptr)))


def test_rounding_to_e4m3(device):
    every = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    ties = (every[1:] + every[:-1]) / 2
    beside = torch.cat([torch.nextafter(ties, torch.full_like(ties, to)) for to in (-1.0, 1e4)])
    many = torch.randn(1024, device=device) * torch.logspace(-5, 4, 1024, device=device)
    special = torch.tensor([448.1, 1e38, torch.inf, torch.nan, 0.0], device=device)
    x = torch.cat([special, every, ties, beside, many])
    x = torch.cat([x, -x, torch.ones(4096 - 2 * len(x), device=device)])
    code, scale = torch.empty(4096, dtype=torch.uint8, device=device), torch.empty(1, device=device)
    for first in (1.0, 448.0, 449.0, 0.0, 3e-5, 3e38, torch.inf, torch.nan, 1e-40, 448 * 2.0**-30):
        x[0] = first
        _round[(1,)](x, code, scale, N=4096)
        found, expected = code.view(torch.float8_e4m3fn).float(), to_e4m3(x).float()
        assert torch.equal(found.nan_to_num(777.0), expected.nan_to_num(777.0))
        assert torch.equal(found.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
        assert torch.equal(scale[0].nan_to_num(7.0), gradient_scale(x[:1]).nan_to_num(7.0)), first


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=str)
def test_weights_are_those_of_the_definition(layout, device, poisoned):
    weight = torch.randn(40, 70, 3, 3, device=device) * torch.logspace(-30, 30, 40, device=device)[:, None, None, None]
    weight[3] = 0.0
    weight[4, 1, 1, 1], weight[5, 0, 0, 0] = torch.nan, torch.inf
    weight = weight.contiguous(memory_format=layout)
    rounded, (integers, scale) = round_weight(weight), int8_weight_reference(weight)
    assert torch.equal(rounded.integers.permute(0, 3, 1, 2), integers)
    assert torch.equal(rounded.scale.nan_to_num(7.0), scale.nan_to_num(7.0))
    expected = to_e4m3(integers.float()).float().permute(1, 2, 3, 0).flip(1, 2)
    assert torch.equal(rounded.turned.float(), expected)


@pytest.mark.parametrize("config", [None, SMALL], ids=["tuned", "small"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_definition_and_leaves_its_statistics(shape, config, device, poisoned):
    if config is None and INTERPRETED and shape is not SHAPES[1]:
        pytest.skip("slow")
    spikes, weight, _ = inputs(shape, device)
    out, partial = convolution.forward(
        spikes.to(torch.int8), round_weight(weight), shape[-1], DTYPE, shape[0], config=config
    )
    assert torch.equal(out, int8_conv2d_reference(spikes, weight, shape[-1])) and out.is_contiguous(memory_format=CL)
    running = torch.zeros(shape[3], device=device), torch.ones(shape[3], device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    expected_running = [value.clone() for value in running]
    if out.numel() == out.shape[1]:
        return
    mean, var, _ = convolution.finish_statistics(partial, *running, 0.3, counter)
    found = batch_stats(out, *expected_running, 0.3)
    for a, b in zip((mean, var, *running), (*found, *expected_running), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * var.max().sqrt().item())
    assert counter == 1


def test_statistics_of_a_large_mean(device):
    """Every weight positive: the mean is 40 standard deviations, of which float32 sums of squares would keep little."""
    spikes = torch.ones(8, 32, 20, 20, dtype=torch.int8, device=device).contiguous(memory_format=CL)
    spikes[:, 0] = (torch.rand(8, 20, 20, device=device) < 0.5).to(torch.int8)
    weight = torch.rand(16, 32, 3, 3, device=device) + 1.0
    out, partial = convolution.forward(spikes, round_weight(weight), 1, torch.float32, config=SMALL)
    mean, var, _ = convolution.finish_statistics(partial)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 2, 3), correction=0)
    close(var, exact_var)
    close(mean, exact_mean)


@pytest.mark.parametrize("promote", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient(shape, promote, device, poisoned):
    spikes, weight, grad = inputs(shape, device)
    rounded, stride = round_weight(weight), shape[-1]
    g, divisor = in_e4m3(grad, rounded.scale)
    size = tuple(spikes.shape[2:])
    config = SMALL | {"PROMOTE": promote}
    found = convolution.input_gradient(g, rounded, divisor, size, stride, torch.float32, config=config)
    expected, _ = int8_conv2d_gradients_reference(grad, spikes, weight, stride)
    close(found, expected, 0.0 if INTERPRETED else 1e-3)  # tensor cores keep about 14 bits of a sum
    assert found.is_contiguous(memory_format=CL)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient(shape, layout, device, poisoned):
    spikes, weight, grad = inputs(shape, device, layout)
    _, scale = int8_weight_reference(weight)
    g, divisor = in_e4m3(grad, scale)
    _, expected = int8_conv2d_gradients_reference(grad, spikes, weight, shape[-1])
    of_spikes = turn(to_e4m3(spikes.float()), shape[0])
    for more in ({}, {"PER_SM": 40}):  # one split and several
        out = torch.empty_like(weight)
        weight_gradient(turn(g, shape[0]), of_spikes, scale, divisor, out, shape[-1], SMALL | more)
        close(out, expected, 0.0 if INTERPRETED else 1e-3)
    again = torch.empty_like(weight)
    weight_gradient(turn(g, shape[0]), of_spikes, scale, divisor, again, shape[-1], SMALL | more)
    assert torch.equal(again, out)


@pytest.mark.parametrize("shape", [(4, 3, 64, 64, 5, 6), (6, 5, 32, 64, 4, 7), (3, 2, 64, 32, 1, 3)], ids=str)
def test_weight_gradient_by_pairs_of_pixels(shape, device, poisoned):
    spikes, weight, grad = inputs((*shape, 1), device)
    _, scale = int8_weight_reference(weight)
    g, divisor = in_e4m3(grad, scale)
    _, expected = int8_conv2d_gradients_reference(grad, spikes, weight)
    config = {"PAIRS": 1, "BLOCK_K": 64, "PROMOTE": 0, "num_warps": 8, "num_stages": 2}
    of_spikes, turned = turn(to_e4m3(spikes.float()), shape[0]), turn(g, shape[0])
    for per_sm in (1, 7):  # one split and several
        out = torch.empty_like(weight)
        weight_gradient(turned, of_spikes, scale, divisor, out, 1, config | {"PER_SM": per_sm})
        close(out, expected, 0.0 if INTERPRETED else 1e-3)
    tuned = weight_gradient(turned, of_spikes, scale, divisor, torch.empty_like(weight), 1)
    close(tuned, expected, 0.0 if INTERPRETED else 1e-3)


# T, B, C, H, W; keep the membrane, residual, its norm, spikes in their dtype
NORMS = [
    ((4, 3, 40, 3, 4), False, False, False, False),
    ((6, 5, 24, 2, 3), True, True, False, False),
    ((3, 4, 16, 1, 2), True, True, True, False),
    ((8, 2, 16, 2, 2), True, True, False, True),
]


@pytest.mark.parametrize(("shape", "keep", "residual", "normed", "full"), NORMS, ids=str)
@pytest.mark.parametrize("spec", [CIFAR, IMAGENET, LIFSpec(reset="soft", surrogate="atan")], ids=str)
def test_norm_and_neuron_are_those_of_norm_lif(shape, keep, residual, normed, full, spec, device, poisoned):
    T, B, C, H, W = shape

    def random(scale):
        return (torch.randn(T * B, C, H, W, device=device) * scale).to(DTYPE).contiguous(memory_format=CL)

    def affine():
        return torch.rand(C, device=device) + 0.5, torch.randn(C, device=device)

    x, r = random(2.0) + 1.0, random(1.0) if residual else None
    own = norm.Norm(*affine(), *batch_stats(x), 1e-5)
    other = norm.Norm(*affine(), *batch_stats(r), 1e-4) if normed else norm.NO_NORM
    config = {"BLOCK_B": 4, "BLOCK_C": 32, "num_warps": 4, "PIXELS_FIRST": B % 2}  # either order
    neuron = spec.op_arguments
    fired, membrane = norm.norm_and_fire(x, r, own, other, T, neuron, keep, full, config)
    tail = (None, 1e-5, T, *neuron, True)
    ops = torch.ops.gac_kernels
    with use_backend("triton"):
        spikes, current, _ = ops.norm_lif(x, r, *own.tensors, *tail, keep, "", *other.tensors, other.eps)
    assert 0.02 < spikes.float().mean() < 0.98
    assert not keep or torch.equal(membrane, current)
    if full:
        assert torch.equal(fired, spikes)
    else:
        assert torch.equal(fired.plain.to(DTYPE), spikes)
        assert torch.equal(fired.turned, turn(to_e4m3(spikes.float()), T))
        assert all(map(torch.equal, norm.to_spikes(spikes, T, config), fired))

    gs, gy = random(1e-3), random(1e-3) if keep else None
    conv_scale = torch.rand(C, device=device) * 1e-2
    kept, source = current if keep else None, r if normed else None
    found = norm.backward(gs, gy, x, source, kept, own, other, conv_scale, T, neuron, residual, config=config)
    with use_backend("triton"):
        gx, ga, *rest = ops.norm_lif_backward(
            gs, gy, x, source, kept, *own.tensors, *tail, residual, "", *other.tensors, other.eps
        )
    h = gx.float() * conv_scale[:, None, None]
    assert found.divisor / gradient_scale(h) in (0.5, 1.0)
    assert torch.equal(found.turned, turn(found.plain, T))
    expected = to_e4m3(h * found.divisor).float()  # gx was rounded to DTYPE before
    differ = found.plain.float() != expected
    assert differ.float().mean() <= (0.1 if CUDA else 0.001)
    close(found.plain.float() / found.divisor, h, 0.04)
    if normed:  # by sums of another number of programs
        close(found.current, ga, torch.finfo(DTYPE).eps / 8)
    else:
        assert not residual or torch.equal(found.current, ga)
    of_norms = [*found.of_norm, *(found.of_res_norm if normed else ())]
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(of_norms, rest, strict=False))


def test_a_gradient_that_is_not_finite_or_zero(device):
    x = torch.randn(8, 16, 2, 2, device=device).to(DTYPE).contiguous(memory_format=CL)
    own = norm.Norm(None, None, *batch_stats(x), 1e-5)
    ones = torch.ones(16, device=device)
    for value, check in ((torch.nan, torch.isnan), (torch.inf, torch.isnan), (0.0, lambda g: g == 0)):
        gs = torch.zeros_like(x)
        gs[0, 0, 0, 0] = value
        found = norm.backward(gs, None, x, None, None, own, norm.NO_NORM, ones, 4, CIFAR.op_arguments, False)
        assert check(found.plain.float()).all()
    assert found.divisor == 1.0


@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_is_its_parts(stride, device):
    """Convolution, statistics, norm and neuron one after the other; the gradient at a current is rounded once less."""
    T = 4
    spikes, weight, grad = inputs((T, 3, 16, 24, 6, 6, stride), device)
    residual = torch.randn_like(grad, requires_grad=True)
    parameters = [torch.rand(24, device=device).requires_grad_(), torch.zeros(24, device=device).requires_grad_()]
    weight.requires_grad_()
    spikes.requires_grad_()
    running = torch.zeros(24, device=device), torch.ones(24, device=device)
    call = layer.Call(
        stride=stride,
        num_steps=T,
        neuron=CIFAR.op_arguments,
        dtype=DTYPE,
        eps=1e-5,
        running=layer.Running(*running, 0.1, None),
        res_statistics=None,
        res_eps=0.0,
        keep_membrane=True,
        full=True,
    )
    small = norm.to_spikes(spikes.detach(), T)
    fired, membrane, nothing = layer.conv_norm_fire(spikes, small, weight, call, tuple(parameters), residual)
    assert nothing is None
    current = int8_conv2d(spikes, weight, stride)
    expected_running = torch.zeros(24, device=device), torch.ones(24, device=device)
    with use_backend("triton"):
        mean, var = batch_stats(current, *expected_running)
        args = (current, residual, *parameters, mean, var, None, 1e-5, T, *CIFAR.op_arguments, True, True, "")
        expected, expected_membrane, _ = torch.ops.gac_kernels.norm_lif(*args)
    assert (fired != expected).float().mean() < 1e-3  # statistics are added up in another order
    close(membrane, expected_membrane, 2 * torch.finfo(DTYPE).eps)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(running, expected_running, strict=True))
    at = (spikes, weight, residual, *parameters)
    found = torch.autograd.grad((fired, membrane), at, (grad, grad))
    wanted = torch.autograd.grad((expected, expected_membrane), at, (grad, grad))
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 2e-2)
        assert a.dtype == b.dtype and a.shape == b.shape


def test_an_edge_is_no_spikes(device):
    edge = layer.edge_like((2, 3, 4, 5), torch.float32, torch.device(device))
    assert edge.isnan().all() and edge.untyped_storage().nbytes() == 4


@pytest.mark.skipif(not ON_HOPPER or bool(hopper.GLUON_ERROR), reason="needs a Hopper GPU and Triton with Gluon")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("config", [(3, 1, 1), (2, 2, 0), (2, 1, 0)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 4, 128, 128, 16, 16, 1), (3, 5, 64, 96, 7, 9, 1), (4, 70, 128, 32, 1, 1, 1), (4, 3, 64, 128, 28, 14, 2)],
    ids=str,
)
def test_hopper_kernel(shape, config, shared, device, monkeypatch, poisoned, request):
    if not shared:  # as with a Triton that refuses it
        monkeypatch.setitem(
            hopper._refusals, (device if device.index is not None else torch.device(device.type, 0), True), "refused"
        )
    monkeypatch.setattr(hopper, "multiprocessors", lambda _: 3)  # so that programs have many tiles
    taken = []
    prepare = hopper.prepare
    monkeypatch.setattr(hopper, "prepare", lambda *args: taken.append(prepare(*args)) or taken[-1])
    forget_launches()
    request.addfinalizer(forget_launches)  # those for three multiprocessors
    spikes, weight, grad = inputs(shape, device)
    rounded, stride = round_weight(weight), shape[-1]
    launch = dict(zip(("COPIES", "STEPS", "PROMOTE"), config, strict=True))
    out, partial = convolution.forward(spikes.to(torch.int8), rounded, stride, DTYPE, shape[0], config=launch)
    assert torch.equal(out, int8_conv2d_reference(spikes, weight, stride))
    for a, b in zip(convolution.finish_statistics(partial)[:2], batch_stats(out), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    if stride == 1:
        g, divisor = in_e4m3(grad, rounded.scale)
        size = tuple(spikes.shape[2:])
        found = convolution.input_gradient(g, rounded, divisor, size, 1, DTYPE, shape[0], config=launch)
        expected, _ = int8_conv2d_gradients_reference(grad, spikes, weight)
        close(found, expected, 4e-3)
    assert all(isinstance(one, hopper.Prepared) for one in taken) and len(taken) == 2 - (stride == 2)


def test_hopper_plans_fit_into_shared_memory():
    for channels, out, size, stride in itertools.product((64, 128, 512), (64, 256), (32, 8), (1, 2)):
        shape, steps = torch.Size((512, channels, size, size)), {"COPIES": 3, "STEPS": 2}
        out_shape = torch.Size((512, out, size // stride, size // stride))
        for shared in (True, False):
            plan = hopper.plan_of(
                shape, out_shape, 4, stride, steps, lambda rows, s=shared: "" if s else "refused" * rows
            )
            assert isinstance(plan, Plan) and plan.ring >= 3 and plan.copies >= 2
    assert "multiples of 32" in hopper.plan_of(torch.Size((4, 48, 8, 8)), out_shape, 4, 1, steps, lambda _: "")
    assert "even sizes" in hopper.plan_of(torch.Size((4, 32, 7, 8)), out_shape, 4, 2, steps, lambda _: "")


def test_units_of_work_leave_few_multiprocessors_idle():
    def steps(channels, size, frames=256):
        shape = torch.Size((frames, channels, size, size))
        return hopper.steps_per_unit(shape, shape, 4, 1, {"COPIES": 2, "STEPS": 1}, 132)

    # 1,568 and 392 units of four steps keep 132 busy; 196 are two rounds for 1.5, and 100 one round for 0.76.
    assert [steps(64, 56), steps(128, 28), steps(256, 14), steps(512, 7)] == [4, 4, 2, 1]
    assert [steps(256, 16, 512), steps(512, 8, 512)] == [4, 4]


@pytest.mark.skipif(bool(hopper.GLUON_ERROR), reason="this Triton has no Gluon")
def test_compiles_for_hopper_anywhere():
    """Triton compiles for a GPU that is not there; products are wgmma on bytes, and e4m3 is rounded by hardware."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = Path(__file__).with_name("compile_eight_bit.py")
    done = subprocess.run([sys.executable, child], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    assert found == {
        "_round_kernel": "cvt.e4m3",
        "forward": "wgmma.s8",
        "input_gradient": "wgmma.e4m3",
        "input_gradient, stride 2": "wgmma.e4m3",
        "weight_gradient": "wgmma.e4m3 tma",
        "weight_gradient, pairs": "wgmma.e4m3 tma",
        "hopper forward": "wgmma.s8 tma",
        "hopper input_gradient": "wgmma.e4m3 tma",
        "apply_kernel": "cvt.e4m3",
    }


def test_the_definition_of_turned(device):
    x = torch.arange(2 * 3 * 5 * 2, device=device).reshape(6, 5, 2, 1).to(torch.uint8)  # T=2, B=3
    turned = turn(x, 2).view(torch.uint8).unflatten(-1, (4, 4))  # H, W, C, image, step
    assert turned.shape == (2, 1, 5, 4, 4) and not turned[..., 3, :].any() and not turned[..., 2:].any()
    assert torch.equal(turned[..., :3, :2].permute(4, 3, 2, 0, 1).reshape(6, 5, 2, 1), x)


def test_bits_of_spikes_are_exact_in_e4m3():
    one = torch.tensor([0x38], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert one.float().item() == 1.0 and F.pad(one.float(), (0, 1))[1] == 0.0
