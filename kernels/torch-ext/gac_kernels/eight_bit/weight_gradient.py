"""Gradient at the weight of a 3x3 convolution from e4m3 gradients and spikes, both turned: images last in memory.

The sum runs over images and pixels, and tensor cores want what is summed over side by side in memory. For one pixel
that are its images at all steps, in each channel: then a tap of the window shifts whole blocks, no window crosses an
image's edge, and what lies outside is never multiplied. `turned_size` says how such a tensor lies in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Descriptor, Launch, prepared
from ..common.tiles import multiprocessors
from ..common.triton import cdiv, next_power_of_2, tl, triton
from ..tuning import shape_config

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: nothing here runs
    TensorDescriptor = None

_BLOCK = 1024
_PAIRED = (32, 64)  # channels that `weight_gradient_pairs_kernel` takes


def turned_size(num_steps: int, batch: int, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Sizes of a turned tensor of int32 words: rows, columns, channels and words.

    A word is one image (byte ``t % 4`` of word ``image * words_per_image + t // 4`` is step t); the last word of an
    image may have steps beyond T, and up to three images may be beyond the batch: all zeros. So a channel's bytes begin
    at multiples of 16, as TMA copies want it.
    """
    return height, width, channels, cdiv(batch, 4) * 4 * cdiv(num_steps, 4)


@triton.jit
def _first_and_count(k, n_in, n_out, STRIDE: tl.constexpr):
    """First output and number of outputs whose window's k-th row (or column) is inside."""
    first = tl.where(k == 0, 1, 0)
    last = tl.minimum(n_out - 1, (n_in - k) // STRIDE)
    return first, last - first + 1


@triton.jit
def weight_gradient_kernel(
    g_desc,
    x_desc,
    partial_ptr,
    H,
    W,
    OH,
    OW,
    C,
    N,
    K,
    STRIDE: tl.constexpr,
    IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A share of the sum for BLOCK_M output by BLOCK_N input channels of one tap: partial (splits, N, 9, C)."""
    blocks_n = tl.cdiv(C, BLOCK_N)
    n = tl.program_id(0) % blocks_n * BLOCK_N
    tap = tl.program_id(0) // blocks_n % 9
    m = tl.program_id(0) // (blocks_n * 9) * BLOCK_M
    first_h, count_h = _first_and_count(tap // 3, H, OH, STRIDE)
    first_w, count_w = _first_and_count(tap % 3, W, OW, STRIDE)
    pixels = tl.maximum(count_h, 0) * tl.maximum(count_w, 0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    begin = pixels * split // splits
    chunks = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range((pixels * (split + 1) // splits - begin) * chunks):
        pixel = begin + step // chunks
        k = step % chunks * BLOCK_K
        oh = first_h + pixel // count_w
        ow = first_w + pixel % count_w
        ih = oh * STRIDE + tap // 3 - 1
        iw = ow * STRIDE + tap % 3 - 1
        g = g_desc.load([(oh * OW + ow) * N + m, k])
        x = x_desc.load([(ih * W + iw) * C + n, k])
        acc = tl.dot(g, x.T, acc, max_num_imprecise_acc=IMPRECISE)
    o = m + tl.arange(0, BLOCK_M)
    c = n + tl.arange(0, BLOCK_N)
    at = (split.to(tl.int64) * N * 9 + (o[:, None] * 9 + tap)) * C + c[None, :]
    tl.store(partial_ptr + at, acc, mask=(o[:, None] < N) & (c[None, :] < C))


@triton.jit
def weight_gradient_pairs_kernel(
    g_desc,
    x_desc,
    partial_ptr,
    H,
    OH,
    pairs,
    K,
    C: tl.constexpr,
    N: tl.constexpr,
    IMPRECISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A share of the sum for one row of taps, of few channels and with stride 1: partial (2 * splits, N, 9, C).

    Two pixels of the gradient meet the four pixels of the input that lie around them: of these eight products six are
    wanted, three taps for each pixel, which are parts of their own. So six products take six tiles of memory, not
    twelve, and with at most 64 channels it is memory that a tap at a time waits for.
    """
    row = tl.program_id(0)
    first_h, count_h = _first_and_count(row, H, OH, 1)
    split, splits = tl.program_id(1), tl.num_programs(1)
    steps = tl.maximum(count_h, 0) * pairs
    begin = steps * split // splits
    chunks = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((2 * N, 4 * C), tl.float32)
    for step in range((steps * (split + 1) // splits - begin) * chunks):
        pair = begin + step // chunks
        k = step % chunks * BLOCK_K
        oh = first_h + pair // pairs
        ow = pair % pairs * 2
        # Pixels beyond the edges are zeros: copies fill up so what is outside of their tensor.
        g = g_desc.load([oh, ow * N, k]).reshape(2 * N, BLOCK_K)
        x = x_desc.load([oh + row - 1, (ow - 1) * C, k]).reshape(4 * C, BLOCK_K)
        acc = tl.dot(g, x.T, acc, max_num_imprecise_acc=IMPRECISE)
    m = tl.arange(0, 2 * N)[:, None]
    c = tl.arange(0, 4 * C)[None, :]
    column = c // C - m // N
    at = (split * 2 + m // N).to(tl.int64) * (N * 9 * C) + (m % N * 9 + row * 3 + column) * C + c % C
    tl.store(partial_ptr + at, acc, mask=(column >= 0) & (column < 3))


@triton.jit
def _finish_kernel(
    partial_ptr,
    scale_ptr,
    divisor_ptr,
    out_ptr,
    splits,
    size,
    C,
    stride_o,
    stride_c,
    stride_h,
    stride_w,
    B: tl.constexpr,
):
    """Sums over splits, in a fixed order, through the gradient's divisor and the channel's scale."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < size
    total = tl.zeros((B,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size + i, mask=inside, other=0.0)
    o, tap, c = i // (9 * C), i // C % 9, i % C
    scale = tl.load(scale_ptr + o, mask=inside, other=1.0) * tl.load(divisor_ptr)
    at = o * stride_o + c * stride_c + tap // 3 * stride_h + tap % 3 * stride_w
    tl.store(out_ptr + at, tl.div_rn(total, scale).to(out_ptr.dtype.element_ty), mask=inside)


def _descriptor(size: torch.Size, rows: int, columns: int) -> Descriptor:
    height, width, channels, words = size
    shape, strides = [height * width * channels, 4 * words], [4 * words, 1]
    return Descriptor(TensorDescriptor, shape, strides, [rows, columns], dtype=torch.float8_e4m3fn)


def _row_descriptor(size: torch.Size, pixels: int, columns: int) -> Descriptor:
    """Of rows of pixels, so that a copy does not go on in the next row."""
    height, width, channels, words = size
    shape, strides = [height, width * channels, 4 * words], [4 * width * channels * words, 4 * words, 1]
    block = [1, pixels * channels, columns]
    return Descriptor(TensorDescriptor, shape, strides, block, dtype=torch.float8_e4m3fn)


def weight_gradient(
    gradient: Tensor,
    spikes: Tensor,
    scale: Tensor,
    divisor: Tensor,
    out: Tensor,
    stride: int,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Write the gradient at a weight.

    Args:
        gradient: At the output, times scale and divisor in e4m3: turned, (H', W', C', words) int32.
        spikes: In e4m3 and turned, (H, W, C, words).
        scale: (C',), the weight's.
        divisor: One float32 value, a power of two.
        out: (C', C, 3, 3), any strides.
        stride: 1 or 2.
        config: Launch parameters in the place of the tuned ones; with PAIRS those of two pixels at a time.

    Returns:
        ``out``.
    """
    device, items = gradient.device, None if config is None else tuple(config.items())
    launches = _launches(gradient.shape, spikes.shape, out.stride(), stride, device, items)
    partial = torch.empty(launches.size, dtype=torch.float32, device=device)
    launches.multiply(gradient, spikes, partial)
    launches.finish(partial, scale, divisor, out)
    return out


class _Launches(NamedTuple):
    """Launches of a weight's gradient, and the size of the partial sums between them."""

    multiply: Launch
    finish: Launch
    size: tuple[int, ...]


@prepared
def _launches(
    gradient: torch.Size,
    spikes: torch.Size,
    strides: tuple[int, ...],
    stride: int,
    device: torch.device,
    items: tuple[tuple[str, int], ...] | None,
) -> _Launches:
    out_height, out_width, out_channels, _ = gradient
    channels = spikes[2]
    if items is None:
        name = f"{channels}-{out_channels}" + (":s2" if stride == 2 else "")
        keys = (name, f"{name}@{out_height}x{out_width}")
        paired = stride == 1 and channels in _PAIRED and out_channels in _PAIRED
        op = "eight_bit_weight_gradient_pairs" if paired else "eight_bit_weight_gradient"
        config = dict(shape_config(op, keys, device))
    else:
        config = dict(items)
    if config.pop("PAIRS", 0):
        multiply, splits = _in_pairs(gradient, spikes, device, config)
    else:
        multiply, splits = _by_taps(gradient, spikes, stride, device, config)
    size = out_channels * 9 * channels
    numbers = (splits, size, channels, *strides)
    finish = Launch(_finish_kernel, (cdiv(size, _BLOCK),), device, numbers, B=_BLOCK, num_warps=4)
    return _Launches(multiply, finish, (splits, out_channels, 9, channels))


def _by_taps(
    gradient: torch.Size, spikes: torch.Size, stride: int, device: torch.device, config: dict[str, int]
) -> tuple[Launch, int]:
    """The launch of `weight_gradient_kernel`, and the number of its partial sums."""
    out_height, out_width, out_channels, words = gradient
    height, width, channels, _ = spikes
    block_m = min(config.pop("BLOCK_M"), max(64, next_power_of_2(out_channels)))
    block_n = min(config.pop("BLOCK_N"), max(16, next_power_of_2(channels)))
    block_k = min(config.pop("BLOCK_K"), max(32, next_power_of_2(4 * words)))
    promoted = config.pop("PROMOTE", 1)
    tiles = cdiv(out_channels, block_m) * cdiv(channels, block_n) * 9
    # As many programs as fit at once, of equal length.
    at_once = config.pop("PER_SM", 1) * multiprocessors(device)
    splits = max(1, min(config.pop("SPLITS", 0) or at_once // tiles, out_height * out_width))
    multiply = Launch(
        weight_gradient_kernel,
        (tiles, splits),
        device,
        (height, width, out_height, out_width, channels, out_channels, 4 * words),
        (_descriptor(gradient, block_m, block_k), _descriptor(spikes, block_n, block_k)),
        STRIDE=stride,
        IMPRECISE=block_k if promoted else None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **config,
    )
    return multiply, splits


def _in_pairs(
    gradient: torch.Size, spikes: torch.Size, device: torch.device, config: dict[str, int]
) -> tuple[Launch, int]:
    """The same of `weight_gradient_pairs_kernel`."""
    out_height, out_width, out_channels, words = gradient
    height, _, channels, _ = spikes
    block_k = min(config.pop("BLOCK_K"), max(32, next_power_of_2(4 * words)))
    pairs = cdiv(out_width, 2)
    splits = max(1, min(config.pop("PER_SM") * multiprocessors(device) // 3, out_height * pairs))
    promoted = config.pop("PROMOTE", 1)
    launch = Launch(
        weight_gradient_pairs_kernel,
        (3, splits),
        device,
        (height, out_height, pairs, 4 * words),
        (_row_descriptor(gradient, 2, block_k), _row_descriptor(spikes, 4, block_k)),
        C=channels,
        N=out_channels,
        IMPRECISE=block_k if promoted else None,
        BLOCK_K=block_k,
        **config,
    )
    return launch, 2 * splits


def turn(x: Tensor, num_steps: int) -> Tensor:
    """A turned copy of (T*B, C, H, W) bytes (uint8, int8 or e4m3): the definition of the layout."""
    x = x.view(torch.uint8)
    samples, channels, height, width = x.shape
    batch = samples // num_steps
    *outer, words = turned_size(num_steps, batch, channels, height, width)
    out = torch.zeros((*outer, words // cdiv(num_steps, 4), cdiv(num_steps, 4) * 4), dtype=torch.uint8, device=x.device)
    out[..., :batch, :num_steps] = x.unflatten(0, (num_steps, batch)).permute(3, 4, 2, 1, 0)
    return out.flatten(3).view(torch.int32)
