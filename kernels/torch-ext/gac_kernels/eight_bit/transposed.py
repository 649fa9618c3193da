"""Input gradient of a 3x3 convolution with stride 2, in plain Triton: four pixels of the input at a time.

A pixel of the input has the taps of its kind: where row and column are even 1 of the 9, where one is odd 2, where both
are 4. The four kinds of a 2x2 block read the same 2x2 pixels of the gradient, so a program computes all four of them:
it loads four tiles of pixels, where programs for each kind on their own load nine.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.launch import Launch
from ..common.triton import cdiv, next_power_of_2, tl, triton


@triton.jit
def _gradients(x_ptr, corner, k, exists, h, w, H, W, C, DH: tl.constexpr, DW: tl.constexpr, zeros):
    """Gradients of the pixels (h + DH, w + DW), zeros beyond the edges: [BLOCK_M, BLOCK_K]."""
    inside = (exists & (h + DH < H) & (w + DW < W))[:, None] & (k < C)[None, :]
    return tl.load(x_ptr + (corner[:, None] + (DH * W + DW) * C) + k[None, :], mask=inside, other=zeros)


@triton.jit
def _multiply(a, w_ptr, n, k, C, TAP: tl.constexpr, inside, zeros, acc, IMPRECISE: tl.constexpr):
    """The sums so far and those of a tap, counted in reverse order: [BLOCK_M, BLOCK_N]."""
    b = tl.load(w_ptr + n[None, :] * (9 * C) + (TAP * C + k)[:, None], mask=inside, other=zeros)
    return tl.dot(a, b, acc, max_num_imprecise_acc=IMPRECISE)


@triton.jit
def _store(y_ptr, acc, factor, at, exists, n, N, inside_n):
    y = (acc * factor).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at[:, None] * N + n[None, :], y, mask=exists[:, None] & inside_n[None, :])


@triton.jit
def transposed_kernel(
    x_ptr,
    w_ptr,
    divisor_ptr,
    y_ptr,
    frames,
    H,
    W,
    OH,
    OW,
    C,
    N,
    ONE_CHUNK: tl.constexpr,
    IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M blocks of 2x2 pixels by BLOCK_N channels: sums through divisor (a scalar).

    x is (frames, H, W, C) and w (N, 3, 3, C), float8 e4m3, y (frames, OH, OW, N), where H is half of OH rounded up. See
    `conv_kernels` for IMPRECISE. With ONE_CHUNK all of C is one BLOCK_K: one kind of pixels is done after the other, so
    that registers hold the sums of one.
    """
    # Neighbouring programs share pixels and differ in channels: the second finds the pixels in the L2 cache.
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    exists = row < frames * H * W
    frame, h, w = row // (H * W), row % (H * W) // W, row % W
    corner = row.to(tl.int64) * C
    at = (frame.to(tl.int64) * OH + 2 * h) * OW + 2 * w
    has_w = exists & (2 * w + 1 < OW)
    has_h = exists & (2 * h + 1 < OH)
    factor = 1.0 / tl.load(divisor_ptr)  # a power of two
    zeros_a = tl.zeros((BLOCK_M, BLOCK_K), x_ptr.dtype.element_ty)
    zeros_b = tl.zeros((BLOCK_K, BLOCK_N), x_ptr.dtype.element_ty)
    nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    even, odd_w, odd_h, odd = nothing, nothing, nothing, nothing
    # An even row has the middle tap alone, an odd one the first at its own row and the last at the next; as columns. Of
    # one chunk the compiler makes no loop.
    for first in range(0, BLOCK_K if ONE_CHUNK else C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        of_weight = (k < C)[:, None] & inside_n[None, :]
        here = _gradients(x_ptr, corner, k, exists, h, w, H, W, C, 0, 0, zeros_a)
        right = _gradients(x_ptr, corner, k, exists, h, w, H, W, C, 0, 1, zeros_a)
        below = _gradients(x_ptr, corner, k, exists, h, w, H, W, C, 1, 0, zeros_a)
        across = _gradients(x_ptr, corner, k, exists, h, w, H, W, C, 1, 1, zeros_a)
        even = _multiply(here, w_ptr, n, k, C, 4, of_weight, zeros_b, even, IMPRECISE)
        if ONE_CHUNK:
            _store(y_ptr, even, factor, at, exists, n, N, inside_n)
        odd_w = _multiply(here, w_ptr, n, k, C, 3, of_weight, zeros_b, odd_w, IMPRECISE)
        odd_w = _multiply(right, w_ptr, n, k, C, 5, of_weight, zeros_b, odd_w, IMPRECISE)
        if ONE_CHUNK:
            _store(y_ptr, odd_w, factor, at + 1, has_w, n, N, inside_n)
        odd_h = _multiply(here, w_ptr, n, k, C, 1, of_weight, zeros_b, odd_h, IMPRECISE)
        odd_h = _multiply(below, w_ptr, n, k, C, 7, of_weight, zeros_b, odd_h, IMPRECISE)
        if ONE_CHUNK:
            _store(y_ptr, odd_h, factor, at + OW, has_h, n, N, inside_n)
        odd = _multiply(here, w_ptr, n, k, C, 0, of_weight, zeros_b, odd, IMPRECISE)
        odd = _multiply(right, w_ptr, n, k, C, 2, of_weight, zeros_b, odd, IMPRECISE)
        odd = _multiply(below, w_ptr, n, k, C, 6, of_weight, zeros_b, odd, IMPRECISE)
        odd = _multiply(across, w_ptr, n, k, C, 8, of_weight, zeros_b, odd, IMPRECISE)
        if ONE_CHUNK:
            _store(y_ptr, odd, factor, at + OW + 1, has_w & has_h, n, N, inside_n)
    if not ONE_CHUNK:
        _store(y_ptr, even, factor, at, exists, n, N, inside_n)
        _store(y_ptr, odd_w, factor, at + 1, has_w, n, N, inside_n)
        _store(y_ptr, odd_h, factor, at + OW, has_h, n, N, inside_n)
        _store(y_ptr, odd, factor, at + OW + 1, has_w & has_h, n, N, inside_n)


def prepare_transposed(
    shape: torch.Size, out_shape: tuple[int, ...], device: torch.device, config: dict[str, Any]
) -> Launch:
    """The launch that writes the gradient at the input of a convolution with stride 2.

    Its tensors are the gradient at the output (e4m3, dense channels-last), `EightBitWeight.turned`, the divisor (one
    float32 value, a power of two) and the output (dense channels-last).

    Args:
        shape: (N, C', H', W') of the gradient.
        out_shape: (N, C, H, W).
        device: Of all.
        config: Launch parameters, ``eight_bit_input_gradient_s2`` of `tuning`.
    """
    frames, channels, height, width = shape
    _, out_channels, out_height, out_width = out_shape
    config = dict(config)
    # No larger than the channels need; 32 is the depth of one tensor core instruction, 16 its least width.
    block_k = min(config.pop("BLOCK_K"), max(32, next_power_of_2(channels)))
    block_n = min(config.pop("BLOCK_N"), max(16, next_power_of_2(out_channels)))
    promoted = config.pop("PROMOTE", 1)
    return Launch(
        transposed_kernel,
        (cdiv(frames * height * width, config["BLOCK_M"]) * cdiv(out_channels, block_n),),
        device,
        (frames, height, width, out_height, out_width, channels, out_channels),
        ONE_CHUNK=channels <= block_k,
        IMPRECISE=block_k if promoted else None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **config,
    )
