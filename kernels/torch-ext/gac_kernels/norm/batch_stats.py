"""Mean and variance of each channel in one read, with the running statistics of a batch norm brought up to date.

Sums are taken around a pivot, the channel's first value, so that a large mean does not swamp a small variance. Each
program walks its tiles in a fixed order and leaves one partial sum, which a second kernel adds up in a fixed order: no
atomics, so the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_finite, check_running, check_tensors
from ..common.fake import register_fake
from ..common.launch import Launch, prepared
from ..common.layout import packed
from ..common.tiles import FINISH, dense, is_channels_last, sum_partials, tile_offsets, tiles_of
from ..common.triton import cdiv, tl, triton
from ..reference import state_dtype
from ..tuning import launch_config

_ROWS = 1024  # values of a channel that are added up in float32


@triton.jit
def _batch_stats_kernel(
    x_ptr,
    partial_ptr,
    rows,
    C,
    S,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot_at = tl.cast(channel, tl.int64) * (1 if CHANNELS_LAST else S)
    pivot = tl.load(x_ptr + pivot_at, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for nth in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        tile = tiles - 1 - nth if REVERSE else nth
        at, inside = tile_offsets(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R)
        d = tl.where(inside, tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - pivot, 0.0)
        total += d
        square += d * d
    at = partial_ptr + tl.program_id(0) * 2 * C + channel
    tl.store(at, tl.sum(total, 0), mask=channel < C)
    tl.store(at + C, tl.sum(square, 0), mask=channel < C)


@triton.jit
def _finish_stats_kernel(
    x_ptr,
    partial_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    momentum,
    count,
    programs,
    C,
    stride,
    UPDATE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if COUNT:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=tl.program_id(0) == 0)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    total, square, _ = sum_partials(partial_ptr, channel, programs, C, 2, BLOCK_P, BLOCK_C)
    pivot = tl.load(x_ptr + tl.cast(channel, tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    values = tl.cast(count, tl.float32)
    shift = total / values
    mean = pivot + shift
    var = tl.maximum(square / values - shift * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean_ptr + channel, mean, mask=inside)
    tl.store(var_ptr + channel, var, mask=inside)
    if UPDATE:
        weight = tl.cast(momentum, tl.float32)
        before = tl.load(running_mean_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        running_mean = (before + weight * (mean - before)).to(running_mean_ptr.dtype.element_ty)
        before = tl.load(running_var_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        running_var = before + weight * (var * (values / (values - 1.0)) - before)
        running_var = running_var.to(running_var_ptr.dtype.element_ty)
        # Where one would not be finite in its dtype, both stay as they are. A difference is 0 unless one is so.
        finite = (running_mean - running_mean == 0.0) & (running_var - running_var == 0.0)
        tl.store(running_mean_ptr + channel, running_mean, mask=inside & finite)
        tl.store(running_var_ptr + channel, running_var, mask=inside & finite)


def _stats_triton(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    num_batches: Tensor | None,
) -> None:
    update = packed((running_mean, running_var))
    walk, finish, elements = _launches(
        x.shape,
        is_channels_last(x),
        x.element_size(),
        x.device,
        momentum,
        running_mean is not None,
        num_batches is not None,
    )
    partial = torch.empty(elements, dtype=torch.float32, device=x.device)
    walk(x, partial)
    finish(x, partial, mean, var, *update, num_batches)
    for running, updated in zip((running_mean, running_var), update, strict=True):
        if running is not None and updated is not None and running is not updated:  # a view of every second value, say
            running.copy_(updated)


@prepared
def _launches(
    shape: torch.Size,
    channels_last: bool,
    size: int,
    device: torch.device,
    momentum: float,
    update: bool,
    count: bool,
) -> tuple[Launch, Launch, int]:
    """What adds up, what finishes, and the elements of the partial sums in between."""
    tiles = tiles_of(shape, channels_last, 1, launch_config("batch_stats", 1, size, device), device)
    programs, channels = tiles.grid[0], tiles.channels
    numbers = (tiles.rows, channels, tiles.spatial, tiles.tiles)
    walk = Launch(_batch_stats_kernel, tiles.grid, device, numbers, **tiles.meta)
    finish = Launch(
        _finish_stats_kernel,
        (cdiv(channels, FINISH["BLOCK_C"]),),
        device,
        (momentum, tiles.rows, programs, channels, 1 if channels_last else tiles.spatial),
        UPDATE=update,
        COUNT=count,
        **FINISH,
    )
    return walk, finish, programs * 2 * channels


def _stats_in_parts(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Statistics of a few rows at a time, brought together in float64.

    PyTorch's own for batch norm on a CPU is 4 to 20 times as fast as `torch.var_mean`, but adds channels-last values up
    in float32 one after the other: of 4 million around 1,000 it finds a mean that is off by 20.
    """
    if is_channels_last(x):
        parts = x.permute(0, 2, 3, 1).flatten(0, 2)[..., None, None].split(_ROWS)
    else:
        parts = x.split(max(1, _ROWS // (x.shape[2] * x.shape[3])))
    found = [torch.batch_norm_update_stats(part.to(mean.dtype), None, None, 0.0) for part in parts]
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    weights = counts / counts.sum()
    means, variances = (torch.stack(values).double() for values in zip(*found, strict=True))
    overall = weights @ means
    mean.copy_(overall)
    var.copy_(weights @ (variances + (means - overall).square()))


def blend_running(running: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], weight: float | Tensor) -> None:
    """Take a batch's mean and unbiased variance into the running ones, (C,) each, in place.

    Where one of a channel's would not be finite in its dtype, both stay as they are. Nothing waits for the host.

    Args:
        running: Running mean and variance, any floating dtype.
        new: Those of the batch, float32 or float64.
        weight: Of the batch, a number or of each channel.
    """
    after = []
    for old, value in zip(running, new, strict=True):
        wide = torch.promote_types(old.dtype, value.dtype)
        share = weight.to(wide) if isinstance(weight, Tensor) else weight
        after.append(torch.lerp(old.to(wide), value.to(wide), share).to(old.dtype))
    finite = after[0].isfinite() & after[1].isfinite()
    for old, value in zip(running, after, strict=True):
        old.copy_(torch.where(finite, value, old))


def _stats_eager(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    num_batches: Tensor | None,
) -> None:
    count = x.numel() // x.shape[1]
    if x.device.type == "cpu":
        _stats_in_parts(x, mean, var)
    else:
        batch_var, batch_mean = torch.var_mean(x.to(mean.dtype), (0, 2, 3), correction=0)
        mean.copy_(batch_mean)
        var.copy_(batch_var)
    if running_mean is not None and running_var is not None:
        blend_running((running_mean, running_var), (mean, var * (count / (count - 1))), momentum)
    if num_batches is not None:
        num_batches.add_(1)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define(
    "batch_stats(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    "Tensor(c!)? num_batches=None) -> (Tensor, Tensor)"
)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    num_batches: Tensor | None = None,
) -> None:
    check_current("x", x, min_dims=4, max_dims=4)
    if x.numel() < 2 * x.shape[1] or x.numel() == 0:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}: use a larger "
            "batch or image, or eval mode"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var both or neither, got one: give the pair")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None:
            check_running(name, running, x)
    if momentum != momentum or momentum in (math.inf, -math.inf):
        raise ValueError(f"expected a finite momentum, got {momentum}: give one such as 0.1")
    if num_batches is not None and (
        num_batches.dtype != torch.int64 or num_batches.numel() != 1 or num_batches.device != x.device
    ):
        raise ValueError(
            f"expected num_batches as one int64 value on {x.device}, got {num_batches.dtype} of shape "
            f"{tuple(num_batches.shape)} on {num_batches.device}: give a batch norm's num_batches_tracked, where x is"
        )


@torch.library.impl(_lib, "batch_stats", "CompositeExplicitAutograd")
def _batch_stats(x, running_mean, running_var, momentum, num_batches=None):
    _check(x, running_mean, running_var, momentum, num_batches)
    mean, var = _empty_stats(x)
    run = _stats_triton if resolve_backend(x.device, x.dtype) == "triton" else _stats_eager
    run(dense(x), mean, var, running_mean, running_var, momentum, num_batches)
    return mean, var


@torch.library.impl(_lib, "batch_stats", "FuncTorchBatched")
def _batch_stats_of_samples(*_: Any):
    raise NotImplementedError(
        "expected batch_stats outside of torch.func.vmap, got it inside: statistics are those of a batch, use eval mode"
    )


@register_fake("gac_kernels::batch_stats", lib=_lib)
def _batch_stats_fake(x, running_mean, running_var, momentum, num_batches=None):
    return _empty_stats(x)


def _empty_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=state_dtype(x.dtype))
    return mean, torch.empty_like(mean)


def batch_stats(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    num_batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel, in one read of x; without gradient, which `norm_lif` has instead.

    Args:
        x: (N, C, H, W); float32, float16, bfloat16 or float64; contiguous or channels-last without a copy.
        running_mean: (C,), updated in place where given: ``(1 - momentum) * running_mean + momentum * mean``.
        running_var: (C,), likewise, with the unbiased variance.
        momentum: Weight of this batch in the running statistics.
        num_batches: One int64 value, counted up by 1 where given.

    Running statistics of a channel of which one would not be finite stay as they are.

    Returns:
        Mean (C,) and variance (C,), float32 (float64 for float64).

    Raises:
        ValueError: x is no floating (N, C, H, W) tensor, or has fewer than two values a channel; only one of the
            running statistics was given, or one of another shape, dtype or device or that cannot be written in place;
            momentum is negative or not finite; or num_batches is no int64 value there.
    """
    check_tensors(running_mean=running_mean, running_var=running_var, num_batches=num_batches)
    check_current("x", x, min_dims=4, max_dims=4)
    check_finite("momentum", momentum, 0.0)
    return torch.ops.gac_kernels.batch_stats(x.detach(), running_mean, running_var, momentum, num_batches)
