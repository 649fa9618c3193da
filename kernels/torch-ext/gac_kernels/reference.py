"""Plain PyTorch, one line an equation, any floating dtype and device: the definition of right.

Same signatures as the ops. ``smooth=True`` replaces the step by the integral of its surrogate derivative, which makes
the whole computation differentiable, so that its gradient can be checked numerically.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.shortcut import shortcut_stride
from .spec import CIFAR, LIFSpec


def surrogate_derivative(d: Tensor, surrogate: str, width: float) -> Tensor:
    """Surrogate of ds/du at d = u - threshold; formulas in `LIFSpec`."""
    if surrogate == "triangle":
        return (width - d.abs()).clamp(min=0.0) / width**2
    if surrogate == "rectangle":
        return (d.abs() < width).to(d.dtype) / (2.0 * width)
    if surrogate == "atan":
        return 1.0 / (width * (1.0 + (d * (math.pi / width)).square()))
    p = torch.sigmoid(d * (4.0 / width))
    return (4.0 / width) * p * (1.0 - p)


def smooth_step(d: Tensor, surrogate: str, width: float) -> Tensor:
    """Integral of `surrogate_derivative`: rises from 0 to 1 around d = 0."""
    if surrogate == "triangle":
        z = (d / width).clamp(-1.0, 1.0)
        return 0.5 + z - 0.5 * z * z.abs()
    if surrogate == "rectangle":
        return 0.5 + d.clamp(-width, width) / (2.0 * width)
    if surrogate == "atan":
        return 0.5 + torch.atan(d * (math.pi / width)) / math.pi
    return torch.sigmoid(d * (4.0 / width))


class _Step(torch.autograd.Function):
    """Heaviside step, strict, with a surrogate derivative."""

    @staticmethod
    def forward(ctx, d: Tensor, surrogate: str, width: float) -> Tensor:
        ctx.save_for_backward(d)
        ctx.surrogate, ctx.width = surrogate, width
        return (d > 0).to(d.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (d,) = ctx.saved_tensors
        return grad * surrogate_derivative(d, ctx.surrogate, ctx.width), None, None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the membrane for an input of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grid_shift(grid: float, dtype: torch.dtype = torch.float32) -> float:
    """What, added to numbers of ``dtype``, leaves no bits finer than ``grid``; taken away again, it makes `on_grid`."""
    return 1.5 * grid / torch.finfo(dtype).eps


def on_grid(x: Tensor, grid: float) -> Tensor:
    """The nearest multiples of a power of two, ties to even; in at least float32.

    Args:
        x: Any shape. float32 is rounded so up to 2**22 times the grid, float64 up to 2**51 times; integers, which are
            multiples already, come back as they are.
        grid: A power of two up to 1, or 0 for no rounding.
    """
    if not grid or not x.is_floating_point():
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    shift = grid_shift(grid, x.dtype)
    return (x + shift).sub_(shift)


def lif_reference(
    x: Tensor, spec: LIFSpec = CIFAR, state: Tensor | None = None, return_state: bool = False, smooth: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-step leaky integrate-and-fire neuron, step by step.

    Args:
        x: (T, ...), input current.
        spec: Dynamics and surrogate.
        state: (...), membrane potential after the reset of the step before the first; zeros if None.
        return_state: Return the last membrane potential as well.
        smooth: Differentiable twin for numerical gradient checks.

    Returns:
        Spikes (T, ...) in x's dtype, and with ``return_state`` the membrane (...) in float32 (float64 for float64).
    """
    v = torch.zeros_like(x[0], dtype=state_dtype(x.dtype)) if state is None else state.to(state_dtype(x.dtype))
    spikes = []
    for current in x:
        u = spec.decay * v + current.to(v.dtype)
        d = u - spec.threshold
        s = smooth_step(d, spec.surrogate, spec.width) if smooth else _Step.apply(d, spec.surrogate, spec.width)
        r = s.detach() if spec.detach_reset else s
        v = u - spec.threshold * r if spec.soft_reset else (1.0 - r) * u
        spikes.append(s.to(x.dtype))
    return (torch.stack(spikes), v) if return_state else torch.stack(spikes)


def gated_lif_reference(
    x: Tensor, spatial: Tensor, temporal: Tensor, spec: LIFSpec = CIFAR, smooth: bool = False
) -> Tensor:
    """Gated spikes of an input that varies over time: ``sigmoid(temporal[t] * spatial[t]) * LIF(x)[t]``.

    Args:
        x: (T, B, C, H, W), input current.
        spatial: (T, B, C, H, W), spatial-channel attention before the sigmoid.
        temporal: (B, T), temporal attention before the sigmoid.
        spec: Dynamics and surrogate.
        smooth: Differentiable twin for numerical gradient checks.

    Returns:
        (T, B, C, H, W) in x's dtype, values in [0, 1).

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """
    dtype = state_dtype(x.dtype)
    spikes = lif_reference(x.to(dtype), spec, smooth=smooth)
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    scores = temporal.to(dtype).t()[:, :, None, None, None] * spatial.to(dtype)  # (T, B, C, H, W)
    return (torch.sigmoid(scores) * spikes).to(x.dtype)


def gac_encode_reference(
    stem: Tensor, spatial: Tensor, temporal: Tensor, spec: LIFSpec = CIFAR, smooth: bool = False
) -> Tensor:
    """Gated attention coding of a static image by literal repetition over time.

    Args:
        stem: (B, C, H, W), the stem's output, the same at every step.
        spatial: (B, C, H, W), spatial-channel attention before the sigmoid.
        temporal: (B, T), temporal attention before the sigmoid.
        spec: Dynamics and surrogate.
        smooth: Differentiable twin for numerical gradient checks.

    Returns:
        (T, B, C, H, W) in stem's dtype, values in [0, 1).
    """
    repeats = (temporal.shape[1], *stem.shape)
    return gated_lif_reference(stem.expand(repeats), spatial.expand(repeats), temporal, spec, smooth)


def gac_fire_reference(
    stem: Tensor, spatial: Tensor, temporal: Tensor, spec: LIFSpec = CIFAR, spikes_dtype: torch.dtype | None = None,
    smooth: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated attention coding, then a second neuron with the same spec.

    Args:
        stem: (B, C, H, W), the same at every step, or (T, B, C, H, W).
        spatial: Spatial-channel attention before the sigmoid, in the shape of stem.
        temporal: (B, T), temporal attention before the sigmoid.
        spec: Dynamics and surrogate of both neurons.
        spikes_dtype: Dtype of the spikes; stem's if None.
        smooth: Differentiable twin for numerical gradient checks.

    Returns:
        Gated spikes and the second neuron's spikes, (T, B, C, H, W) each.
    """
    gated = (gac_encode_reference if stem.dim() == 4 else gated_lif_reference)(stem, spatial, temporal, spec, smooth)
    spikes = lif_reference(gated, spec, smooth=smooth)
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    return gated, spikes if spikes_dtype is None else spikes.to(spikes_dtype)


def norm_lif_reference(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    num_steps: int,
    spec: LIFSpec = CIFAR,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    batch_stats: bool = False,
    return_membrane: bool = False,
    smooth: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Batch norm, residual and multi-step LIF, one after the other; arguments as in `norm_lif`.

    With ``batch_stats`` mean and variance are computed from x here, so that autograd sees them; the ones given are not
    used.
    """
    wide = x.to(state_dtype(x.dtype))
    if batch_stats:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    a = wide
    if mean is not None and var is not None:
        a = (wide - mean[:, None, None]) * torch.rsqrt(var + eps)[:, None, None]
    if weight is not None:
        a = a * weight[:, None, None]
    if bias is not None:
        a = a + bias[:, None, None]
    if residual is not None:
        a = a + residual
    if return_membrane:
        a = a.to(x.dtype)
    spikes = lif_reference(a.unflatten(0, (num_steps, -1)), spec, smooth=smooth)
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    spikes = spikes.flatten(0, 1).to(x.dtype)
    return (a, spikes) if return_membrane else spikes


def spike_conv_reference(
    spikes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, num_steps: int, spec: LIFSpec = CIFAR, *,
    stride: int = 1, residual: Tensor | None = None, return_membrane: bool = False, grid: float = 0.0,
    shortcut: Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Convolution, scale, bias, residual and multi-step LIF, one after the other; arguments as in `spike_conv`.

    The convolution is summed in float64, which holds its integers exactly; all that follows is computed in ``dtype``:
    float64 for the network as mathematics has it, float32 for the bits that `spike_conv` returns. The current that is
    returned is in ``dtype``. A shortcut's convolution is summed in float64 too, then rounded to its dtype.
    """
    sums = F.conv2d(spikes.double(), weight.double(), None, stride, 1).to(dtype)
    current = sums * scale.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None]
    if residual is not None and shortcut is not None:
        side_stride = shortcut_stride(tuple(residual.shape[2:]), tuple(sums.shape[2:]))
        residual = F.conv2d(residual.double(), shortcut.double(), None, side_stride).to(shortcut.dtype)
    if residual is not None:
        current = current + on_grid(residual.to(dtype), grid)
    fired = lif_reference(current.unflatten(0, (num_steps, -1)), spec)
    assert isinstance(fired, Tensor)  # a pair only where the state is asked for
    spikes = fired.flatten(0, 1).to(torch.int8)
    return (current, spikes) if return_membrane else spikes
