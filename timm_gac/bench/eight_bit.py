"""Cases of `tools/check_eight_bit.py`: kernels that train in 8 bits, their definitions, the same work in 16 bits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from gac_kernels import CIFAR, batch_stats, int8_conv2d, use_backend
from gac_kernels.eight_bit import convolution, norm
from gac_kernels.eight_bit.weight_gradient import turn, weight_gradient
from gac_kernels.eight_bit.weights import round_weight
from gac_kernels.reference.int8_conv2d import gradient_scale, int8_weight_reference, to_e4m3

from ..layers.convolution import SpikeConv2d

CL = torch.channels_last
KERNELS = ("weights", "forward", "input_gradient", "weight_gradient", "norm_fwd", "norm_bwd")
# Relative errors that rounding explains: results of 16 bits; float8 sums of about 14 bits; gradients in e4m3.
LIMITS = {"input_gradient": 4e-3, "weight_gradient": 1e-3, "norm_bwd": 0.04}


class Shape(NamedTuple):
    """A convolution: channels, its output's, height and width of its input, and stride."""

    channels: int
    out_channels: int
    height: int
    width: int
    stride: int


class Case(NamedTuple):
    """A kernel on a shape.

    Attributes:
        kernel: One of `KERNELS`.
        shape: The convolution, or the one before the norm.
        kind: Of a norm's residual: "plain" (none), "residual" or "normed".
        config: Launch parameters, or None for those that training takes.
    """

    kernel: str
    shape: Shape
    kind: str
    config: dict[str, int] | None

    def __str__(self) -> str:
        c, o, h, w, stride = self.shape
        config = "" if self.config is None else " " + ",".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.kernel} {c}-{o}@{h}x{w}{':s2' * (stride == 2)}{' ' * bool(self.kind)}{self.kind}{config}"


class Built(NamedTuple):
    """What a case runs.

    Attributes:
        run: The kernel's launch.
        check: Its errors by name, and "" or why they are too large, from what run returned.
        baseline: The same work in bfloat16, or None.
    """

    run: Callable[[], Any]
    check: Callable[[Any], tuple[dict[str, float], str]]
    baseline: Callable[[], Any] | None


def _count(found: Counter[Shape], conv: SpikeConv2d, inputs: tuple[Tensor, ...], _: Any) -> None:
    height, width = inputs[0].shape[2:]
    found[Shape(conv.in_channels, conv.out_channels, height, width, conv.stride[0])] += 1


def shapes_of(model: str, num_steps: int, image_size: int) -> dict[Shape, int]:
    """The convolutions of a network that can train in 8 bits, and how many there are of each."""
    network = timm.create_model(model, num_classes=10, num_steps=num_steps).train()
    found: Counter[Shape] = Counter()
    for module in network.modules():
        if isinstance(module, SpikeConv2d):
            module.register_forward_hook(functools.partial(_count, found))
    with torch.no_grad():
        network(torch.randn(2, network.in_chans, image_size, image_size))
    return dict(found)


def cases_of(shapes: dict[Shape, int], variants: dict[str, list[dict[str, int]]]) -> list[Case]:
    """All kernels on all shapes, with the launch parameters of training and those given as variants.

    Norms are there once for each size of what is normalised.
    """
    found, normed = [], set[tuple[int, ...]]()
    for shape in shapes:
        behind = (shape.out_channels, shape.height // shape.stride, shape.width // shape.stride)
        for kernel in KERNELS:
            if kernel.startswith("norm") and behind in normed:
                continue
            kinds = ("plain", "residual", "normed") if kernel.startswith("norm") else ("",)
            for config in (None, *variants.get(kernel, [])):
                found += [Case(kernel, shape, kind, config) for kind in kinds]
        normed.add(behind)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error, in float64."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def verdict(errors: dict[str, float], wrong: list[str]) -> tuple[dict[str, float], str]:
    """Errors with three digits, and what is wrong as one sentence."""
    return {name: float(f"{value:.3g}") for name, value in errors.items()}, "; ".join(wrong)


def build(case: Case, num_steps: int, batch: int, device: torch.device, dtype: torch.dtype) -> Built:
    """The case with new random inputs."""
    torch.manual_seed(0)
    if case.kernel.startswith("norm"):
        return build_norm(case, num_steps, batch, device, dtype)
    c, o, height, width, stride = case.shape
    x = (torch.rand(num_steps * batch, c, height, width, device=device) < 0.2).to(dtype).contiguous(memory_format=CL)
    w = (torch.randn(o, c, 3, 3, device=device) * 0.05).contiguous(memory_format=CL)
    if case.kernel == "weights":
        return Built(lambda: round_weight(w), functools.partial(check_weights, w), None)
    weight = round_weight(w)
    if case.kernel == "forward":
        spikes = x.to(torch.int8)
        run = functools.partial(convolution.forward, spikes, weight, stride, dtype, num_steps, config=case.config)
        w16 = w.to(dtype)
        return Built(run, functools.partial(check_forward, x, w, stride), lambda: F.conv2d(x, w16, None, stride, 1))
    size = (num_steps * batch, o, (height - 1) // stride + 1, (width - 1) // stride + 1)
    grad = (torch.randn(size, device=device) * 1e-3).to(dtype).contiguous(memory_format=CL)
    return build_gradient(case, x, w, weight, grad, num_steps)


def build_gradient(case: Case, x: Tensor, w: Tensor, weight: Any, grad: Tensor, num_steps: int) -> Built:
    """Gradient at the spikes x or at the weight w."""
    stride, at_input = case.shape.stride, case.kernel == "input_gradient"
    h = grad.float() * weight.scale[:, None, None]
    divisor = gradient_scale(h).reshape(1)
    g8 = to_e4m3(h * divisor).contiguous(memory_format=CL)
    del h
    if at_input:
        size = (x.shape[2], x.shape[3])

        def run() -> Tensor:
            return convolution.input_gradient(g8, weight, divisor, size, stride, x.dtype, num_steps, case.config)
    else:
        turned, spikes, out = turn(g8, num_steps), turn(to_e4m3(x.float()), num_steps), torch.empty_like(w)

        def run() -> Tensor:
            return weight_gradient(turned, spikes, weight.scale, divisor, out, stride, case.config)

    def check(found: Tensor) -> tuple[dict[str, float], str]:
        backward = torch.ops.gac_kernels.int8_conv2d_backward
        expected = backward(grad.float(), x.float(), w, stride, 1, False, at_input, not at_input)[not at_input]
        error = relative(found, expected)
        shrunk = ((found.double() * expected).sum() / expected.double().square().sum()).item() - 1
        wrong = [] if error < LIMITS[case.kernel] else [f"error {error:.2e}"]  # NaN is wrong too
        return verdict({"error": error, "shrunk": shrunk}, wrong)

    w16 = w.to(x.dtype)
    convolve = functools.partial(
        torch.ops.aten.convolution_backward,
        grad, x, w16, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [at_input, not at_input, False],
    )  # fmt: skip
    return Built(run, check, convolve)


def check_weights(w: Tensor, found: Any) -> tuple[dict[str, float], str]:
    """All bits are those of the definition."""
    integers, scale = int8_weight_reference(w)
    turned = to_e4m3(integers.float()).float().permute(1, 2, 3, 0).flip(1, 2)
    equal = {
        "integers": torch.equal(found.integers.permute(0, 3, 1, 2), integers),
        "scale": torch.equal(found.scale, scale),
        "turned": torch.equal(found.turned.float(), turned),
    }
    return verdict({}, [f"{name} differ" for name, same in equal.items() if not same])


def check_forward(x: Tensor, w: Tensor, stride: int, found: Any) -> tuple[dict[str, float], str]:
    """All bits are those of the definition; statistics are those of what was stored."""
    out, partial = found
    expected = int8_conv2d(x, w, stride)
    mean, var, _ = convolution.finish_statistics(partial)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 2, 3), correction=0)
    errors = {
        "mean": ((mean - exact_mean).abs() / exact_var.sqrt()).max().item(),
        "var": (var / exact_var - 1).abs().max().item(),
    }
    wrong = [f"{name} off by {value:.1e}" for name, value in errors.items() if not value < 1e-5]
    differ = (out != expected).sum().item()
    return verdict(errors, wrong + [f"{differ} values differ"] * (differ > 0))


def build_norm(case: Case, num_steps: int, batch: int, device: torch.device, dtype: torch.dtype) -> Built:
    """Norm and neuron behind a convolution, forward or backward."""
    channels, stride = case.shape.out_channels, case.shape.stride
    size = (num_steps * batch, channels, (case.shape.height - 1) // stride + 1, (case.shape.width - 1) // stride + 1)

    def random(scale: float) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(dtype).contiguous(memory_format=CL)

    def normed(of: Tensor) -> norm.Norm:
        return norm.Norm(
            torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device), *batch_stats(of), 1e-5
        )

    x, keep = random(2.0), case.kind != "plain"
    residual = random(1.0) if keep else None
    own, other = normed(x), norm.NO_NORM
    if residual is not None and case.kind == "normed":
        other = normed(residual)
    neuron, ops = CIFAR.op_arguments, torch.ops.gac_kernels
    tail = (*own.tensors, None, own.eps, num_steps, *neuron, True, keep, "", *other.tensors, other.eps)

    def in_16_bits() -> Any:
        with use_backend("triton"):
            return ops.norm_lif(x, residual, *tail)

    if case.kernel == "norm_fwd":
        run = functools.partial(
            norm.norm_and_fire, x, residual, own, other, num_steps, neuron, keep, False, case.config
        )

        def check(found: Any) -> tuple[dict[str, float], str]:
            spikes, membrane = in_16_bits()[:2]
            wrong = [] if not keep or torch.equal(found[1], membrane) else ["the current differs"]
            flipped = (found[0].plain.float() != spikes.float()).float().mean().item()
            wrong += [f"{flipped:.1e} of the spikes differ"] * (not flipped < 1e-5)
            same = torch.equal(found[0].turned, turn(to_e4m3(found[0].plain.float()), num_steps))
            return verdict({"flipped": flipped}, wrong + ["turned spikes differ"] * (not same))

        return Built(run, check, in_16_bits)
    membrane = in_16_bits()[1] if keep else None
    source = residual if case.kind == "normed" else None
    gs, gy = random(1e-3), random(1e-3) if keep else None
    scale = torch.rand(channels, device=device) * 1e-2

    def backward_in_16_bits() -> Any:
        with use_backend("triton"):
            return ops.norm_lif_backward(gs, gy, x, source, membrane, *tail)

    def run_backward() -> norm.Gradients:
        return norm.backward(
            gs, gy, x, source, membrane, own, other, scale, num_steps, neuron, keep, config=case.config
        )

    return Built(
        run_backward,
        functools.partial(check_norm_gradient, backward_in_16_bits, scale, keep, num_steps),
        backward_in_16_bits,
    )


def check_norm_gradient(
    in_16_bits: Callable[[], Any], scale: Tensor, keep: bool, num_steps: int, found: norm.Gradients
) -> tuple[dict[str, float], str]:
    """Within rounding of the gradient in 16 bits, and turned to the byte."""
    gx, current = in_16_bits()[:2]
    h = gx.float() * scale[:, None, None]
    errors = {
        "error": relative(found.plain.float() / found.divisor, h),
        "divisor": (found.divisor / gradient_scale(h)).item(),
    }
    errors["current"] = relative(found.current, current) if keep else 0.0
    wrong = [] if errors["error"] < LIMITS["norm_bwd"] else ["the gradient is further off than e4m3"]
    wrong += ["turned gradients differ"] * (not torch.equal(found.turned, turn(found.plain, num_steps)))
    wrong += ["another divisor"] * (errors["divisor"] not in (0.5, 1.0))
    wrong += ["the current's gradient is off"] * (not errors["current"] < 1e-3)  # sums in another order
    return verdict(errors, wrong)
