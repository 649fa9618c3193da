"""How the batch-norm kernels walk a time-folded (T*B, C, H, W) tensor: tiles of rows (pixels) by channels.

A row is one pixel of one sample, numbered over (B, H, W); step t of it lies B*C*H*W elements further on. In
channels-last memory the channels of a row lie side by side, in contiguous memory the pixels of a channel do.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton import cdiv, is_embedding, next_power_of_2, tl, triton

# In the interpreter: two programs, so that the sharing of tiles is tested.
_INTERPRETED_PROCESSORS = 2


@triton.jit
def tile_offsets(tile, channel, rows, C, S, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr):
    """Offsets [BLOCK_R, BLOCK_C] of a tile in one step's (B, C, H, W) frame, and their mask."""
    row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row[:, None] < rows) & (channel[None, :] < C)
    if CHANNELS_LAST:
        at = row[:, None] * C + channel[None, :]
    else:
        at = ((row // S) * (tl.cast(C, tl.int64) * S) + row % S)[:, None] + tl.cast(channel, tl.int64)[None, :] * S
    return at, inside


@triton.jit
def norm_affine(channel, C, w_ptr, b_ptr, mean_ptr, var_ptr, EPS: tl.constexpr):
    """Batch norm of channels as ``x * scale + shift``; also mean and 1 / standard deviation, [1, BLOCK_C] each.

    A pointer that is None stands for weights of 1, biases of 0, or, where mean and var are None, for no normalisation.
    """
    inside = channel < C
    mean = tl.zeros_like(channel).to(tl.float32)
    rstd = mean + 1.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=inside, other=1.0).to(tl.float32) + EPS)
    scale = rstd
    if w_ptr is not None:
        scale = rstd * tl.load(w_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    shift = -mean * scale
    if b_ptr is not None:
        shift += tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return scale[None, :], shift[None, :], mean[None, :], rstd[None, :]


@triton.jit
def sum_partials(partial_ptr, channel, programs, C, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first sums of each channel over partial sums [programs, SUMS, C], in fixed order.

    There are three of them where SUMS is odd, else two, and the third is 0; others may lie behind them.
    """
    a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    b = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    c = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        inside = (program[:, None] < programs) & (channel[None, :] < C)
        at = partial_ptr + program[:, None] * SUMS * C + channel[None, :]
        a += tl.load(at, mask=inside, other=0.0)
        b += tl.load(at + C, mask=inside, other=0.0)
        if SUMS % 2 == 1:
            c += tl.load(at + 2 * C, mask=inside, other=0.0)
    return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)


# Few, wide iterations: each waits for memory, and there are up to 8 programs per multiprocessor.
FINISH = {"BLOCK_P": 512, "BLOCK_C": 8, "num_warps": 8}


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense (N, C, H, W) tensor is to be walked channels-last."""
    return x.is_contiguous(memory_format=torch.channels_last) and not (x.is_contiguous() and x.shape[1] > 1)


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous or channels-last, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


class Tiles(NamedTuple):
    """A launch over tiles of rows by channels.

    Attributes:
        grid: Programs over rows and over channels.
        rows: Rows of one step.
        channels: C.
        spatial: H * W.
        tiles: Tiles of rows, where a fixed number of programs shares them.
        meta: CHANNELS_LAST, REVERSE, BLOCK_R, BLOCK_C and num_warps of the kernel; where tiles are shared, STAGES too.
    """

    grid: tuple[int, int]
    rows: int
    channels: int
    spatial: int
    tiles: int
    meta: dict[str, int]


def channel_tiles(x: Tensor, num_steps: int, config: dict[str, int]) -> Tiles:
    """Launch over a dense (T*B, C, H, W) tensor.

    Args:
        x: (T*B, C, H, W), contiguous or channels-last.
        num_steps: T.
        config: TILE (elements per tile), BLOCK_C (channels per tile), num_warps, REVERSE (from the last tile to the
            first) and, where a fixed number of programs shares the tiles, PER_SM (programs per multiprocessor) and
            STAGES (tiles in flight; with 1 a tile is loaded when it is needed).
    """
    # By position: a cached function takes longer to look up keywords.
    divide = _divide.__wrapped__ if is_embedding() else _divide  # symbols are no keys of a cache
    return divide(x.shape, is_channels_last(x), num_steps, tuple(config.items()), x.device)


@functools.lru_cache(maxsize=4096)
def _divide(
    shape: torch.Size, channels_last: bool, num_steps: int, items: tuple[tuple[str, int], ...], device: torch.device
) -> Tiles:
    return tiles_of(shape, channels_last, num_steps, dict(items), device)


def tiles_of(
    shape: torch.Size, channels_last: bool, num_steps: int, config: dict[str, int], device: torch.device
) -> Tiles:
    """`channel_tiles` of a tensor of this shape, walked channels-last or not."""
    channels = shape[1]
    block_c = min(config["BLOCK_C"], next_power_of_2(channels)) if channels_last else 1
    block_r = max(1, config["TILE"] // block_c)
    rows = math.prod(shape) // (num_steps * channels)  # torch.Size.numel() would fix a size that is a symbol
    count, blocks = cdiv(rows, block_r), cdiv(channels, block_c)
    programs = count
    if "PER_SM" in config:
        programs = max(1, min(count, config["PER_SM"] * multiprocessors(device) // blocks))
    meta = dict(CHANNELS_LAST=channels_last, REVERSE=bool(config["REVERSE"]), BLOCK_R=block_r, BLOCK_C=block_c)
    meta |= {name: config[name] for name in ("num_warps", "STAGES") if name in config}
    return Tiles(
        grid=(programs, blocks),
        rows=rows,
        channels=channels,
        spatial=shape[2] * shape[3],
        tiles=count,
        meta=meta,
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; two elsewhere."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
