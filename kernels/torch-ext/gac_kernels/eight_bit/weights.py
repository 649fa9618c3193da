"""Weights of a 3x3 convolution in 8 bits: integers for the forward pass, the same in e4m3 for the input gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, prepared
from ..common.triton import cdiv, tl, triton
from ..reference.int8_conv2d import LEVELS, ZERO_SCALE
from .rounding import e4m3_code, to_integer

_LEVELS = tl.constexpr(float(LEVELS))
_LEAST = tl.constexpr(LEVELS * 2.0**-118)
_ZERO_SCALE = tl.constexpr(ZERO_SCALE)


class EightBitWeight(NamedTuple):
    """A weight (C', C, 3, 3) in 8 bits.

    Attributes:
        integers: (C', 3, 3, C) int8, `int8_weight`'s.
        turned: (C, 3, 3, C') float8 e4m3: the integers with taps in reverse order, what the input gradient multiplies.
        scale: (C',) float32, `int8_weight`'s.
    """

    integers: Tensor
    turned: Tensor
    scale: Tensor


@triton.jit
def _scale_kernel(w_ptr, scale_ptr, K, stride_o, stride_c, stride_k, C, BLOCK: tl.constexpr):
    """The scale of one output channel; see `reference.int8_conv2d.int8_weight_reference`."""
    o = tl.program_id(0)
    peak = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        i = first + tl.arange(0, BLOCK)
        at = o * stride_o + i % C * stride_c + i // C * stride_k
        w = tl.abs(tl.load(w_ptr + at, mask=i < K, other=0.0).to(tl.float32))
        peak = tl.maximum(peak, w, propagate_nan=tl.PropagateNan.ALL)
    # Of numbers that are not negative the bits are in the same order; NaN's are the largest.
    peak = tl.max(peak.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    bits = tl.div_rn(peak, peak * 0.0 + _LEVELS).to(tl.int32, bitcast=True)
    scale = ((bits + 255) & -256).to(tl.float32, bitcast=True)  # up to 16 significant bits
    scale = tl.where(peak < _LEAST, _ZERO_SCALE, scale)
    scale = tl.where(peak - peak == 0.0, scale, float("nan"))
    tl.store(scale_ptr + o, scale)


@triton.jit
def _round_kernel(
    w_ptr,
    scale_ptr,
    integers_ptr,
    turned_ptr,
    N,
    C,
    stride_o,
    stride_c,
    stride_h,
    stride_w,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Integers and their e4m3 numbers of a block of output by input channels of one tap."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(2)
    inside = (o[:, None] < N) & (c[None, :] < C)
    at = o[:, None] * stride_o + c[None, :] * stride_c + tap // 3 * stride_h + tap % 3 * stride_w
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + o, mask=o < N, other=1.0)
    x = tl.div_rn(w, tl.broadcast_to(scale[:, None], (BLOCK_O, BLOCK_C)))
    x = to_integer(tl.clamp(tl.where(x == x, x, 0.0), -_LEVELS, _LEVELS))
    tl.store(integers_ptr + (o[:, None] * 9 + tap) * C + c[None, :], x.to(tl.int8), mask=inside)
    turned = (c[None, :] * 9 + 8 - tap) * N + o[:, None]
    tl.store(turned_ptr + turned, e4m3_code(x), mask=inside)


def round_weight(weight: Tensor) -> EightBitWeight:
    """Round a weight (C', C, 3, 3) to 8 bits, in two kernels.

    Args:
        weight: float32, float16 or bfloat16, any strides, on a device where Triton runs.
    """
    weight, device = weight.detach(), weight.device
    out_channels, channels = weight.shape[:2]
    integers = torch.empty((out_channels, 3, 3, channels), dtype=torch.int8, device=device)
    turned = torch.empty((channels, 3, 3, out_channels), dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(out_channels, dtype=torch.float32, device=device)
    if weight.stride(2) != 3 * weight.stride(3):  # a tap's number times one stride has to be its place
        weight = weight.contiguous()
    find_scale, round_to_integers = _launches(out_channels, channels, weight.stride(), device)
    find_scale(weight, scale)
    round_to_integers(weight, scale, integers, turned.view(torch.uint8))
    return EightBitWeight(integers, turned, scale)


@prepared
def _launches(
    out_channels: int, channels: int, strides: tuple[int, ...], device: torch.device
) -> tuple[Launch, Launch]:
    stride_o, stride_c, _, stride_w = strides
    find_scale = Launch(
        _scale_kernel,
        (out_channels,),
        device,
        (9 * channels, stride_o, stride_c, stride_w, channels),
        BLOCK=1024,
        num_warps=4,
    )
    round_to_integers = Launch(
        _round_kernel,
        (cdiv(out_channels, 32), cdiv(channels, 64), 9),
        device,
        (out_channels, channels, *strides),
        BLOCK_O=32,
        BLOCK_C=64,
        num_warps=4,
    )
    return find_scale, round_to_integers
