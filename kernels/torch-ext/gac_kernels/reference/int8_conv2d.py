"""3x3 convolution of spikes with int8 weights forward and fp8 gradients backward, for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as grad_of

# Largest integer of a weight, and largest number of float8 e4m3, which has no infinity.
LEVELS = 127
E4M3_MAX = 448.0
# Bits of a scale: with the 7 of a weight's integer their product has at most 24, and float32 holds it exactly.
_DROPPED_BITS = 24 - 16
# Scale of a channel of zeros, which its gradient alone sees: times the scale, it is rounded with one power of two for
# all channels. Its output is constant, so a batch norm multiplies its gradient by 1 / sqrt(eps) = 316, where other
# channels have scales near 1 / 1000. With a scale of 1 all of their gradients rounded to 0; with this one both fit.
ZERO_SCALE = 2.0**-17


def int8_weight_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as integers with a scale per output channel, symmetric around 0.

    The scale is the channel's largest magnitude divided by 127, rounded up to 16 significant bits (`ZERO_SCALE` for a
    channel of zeros). Integers times scale are then exact in float32, and rounding them again returns the same integers
    and scale.

    Args:
        weight: (C', C, kH, kW), taken as float32.

    Returns:
        Integers from -127 to 127, int8 in the weight's shape, and scales (C',) float32, NaN where a channel is not
        finite.
    """
    weight = weight.detach().float()
    peak = weight.abs().amax((1, 2, 3))
    mask = (1 << _DROPPED_BITS) - 1
    scale = (((peak / LEVELS).view(torch.int32) + mask) & ~mask).view(torch.float32)
    scale = torch.where(peak < LEVELS * 2.0**-118, ZERO_SCALE, scale)  # zeros, and near where float32 has fewer bits
    scale = torch.where(peak.isfinite(), scale, torch.nan)
    integers = (weight / scale[:, None, None, None]).round().clamp(-LEVELS, LEVELS)
    return integers.nan_to_num(0.0).to(torch.int8), scale


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest float8 e4m3 numbers, ties to even, saturating at 448; NaN stays."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def gradient_scale(x: Tensor) -> Tensor:
    """The largest power of two that keeps ``x`` times it within 448: a scalar on x's device, for which no host waits.

    It is 1 for zeros and NaN where x is not finite.
    """
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1), and 448 = 0.875 * 2**9
    power = (torch.where(mantissa <= 0.875, 9, 8) - exponent).clamp(-120, 120)
    # By its exponent's bits: not every device's pow, which ldexp calls, gives powers of two exactly.
    scale = ((power.to(torch.int32) + 127) << 23).view(torch.float32).to(largest.dtype)
    return torch.where(largest.isfinite(), torch.where(largest > 0, scale, 1.0), torch.nan)


def int8_conv2d_reference(
    spikes: Tensor, weight: Tensor, stride: int = 1, *, bits: Tensor | None = None, num_steps: int = 1
) -> Tensor:
    """``conv2d(spikes, integers) * scale`` with the integers and scales of `int8_weight_reference`; no gradient.

    Args:
        spikes: (N, C, H, W), 0 or 1.
        weight: (C', C, 3, 3); padding is 1.
        stride: 1 or 2.
        bits: Those of the spikes; not used.
        num_steps: T; not used.

    Returns:
        (N, C', H', W') in the spikes' dtype; the sums are exact, the product is rounded once to float32 (in float64
        not at all), then to that dtype.
    """
    integers, scale = int8_weight_reference(weight)
    sums = F.conv2d(spikes.detach().double(), integers.double(), None, stride, 1)
    wide = torch.promote_types(spikes.dtype, torch.float32)
    return (sums.to(wide) * scale.to(wide)[:, None, None]).to(spikes.dtype)


def int8_conv2d_gradients_reference(
    grad: Tensor, spikes: Tensor, weight: Tensor, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Gradients of `int8_conv2d`: both take the gradient at the output in float8 e4m3, straight through the rounding.

    With h = grad * scale per channel in float32, s = `gradient_scale` (h) and g = e4m3(h * s), the gradient at the
    spikes is conv_transpose(g, e4m3(integers)) / s and that at the weight conv_weight(g, spikes) / (s * scale).

    Args:
        grad: (N, C', H', W').
        spikes: (N, C, H, W).
        weight: (C', C, 3, 3).
        stride: 1 or 2.

    Returns:
        The gradients at spikes and weight, summed in float64, in float64.
    """
    integers, scale = int8_weight_reference(weight)
    h = grad.float() * scale[:, None, None]
    s = gradient_scale(h)
    g = to_e4m3(h * s).double()
    at_spikes = grad_of.conv2d_input(spikes.shape, to_e4m3(integers.float()).double(), g, stride, 1) / s.double()
    at_weight = grad_of.conv2d_weight(spikes.double(), weight.shape, g, stride, 1)
    return at_spikes, at_weight / (s.double() * scale.double()[:, None, None, None])
