"""Forward pass and input gradient of a 3x3 convolution with operands of one byte: launches."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..common.layout import on_device
from ..common.triton import cdiv, next_power_of_2
from ..tuning import shape_config
from . import hopper
from .conv_kernels import conv_kernel, finish_statistics_kernel
from .weights import EightBitWeight

_logger = logging.getLogger(__name__)
_FINISH = {"BLOCK_P": 256, "BLOCK_C": 8, "num_warps": 8}


def _empty(frames: int, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = (frames, channels, height, width)
    return torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last)


def _config(op: str, channels: int, out_channels: int, size: tuple[int, int], stride: int, device: torch.device):
    name = f"{channels}-{out_channels}" + (":s2" if stride == 2 else "")
    return dict(shape_config(op, (name, f"{name}@{size[0]}x{size[1]}"), device))


def _run(
    op: str,
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    divisor: Tensor | None,
    out: Tensor,
    stride: int,
    transposed: bool,
    stats: bool,
    num_steps: int,
    config: dict[str, int] | None,
) -> Tensor | None:
    """In Gluon where that applies, else in plain Triton."""
    frames, channels, height, width = x.shape
    out_channels, out_height, out_width = out.shape[1:]
    size = (height, width) if transposed else (out_height, out_width)
    if not transposed:
        of_hopper = config or _config(f"{op}_hopper", channels, out_channels, size, stride, x.device)
        refused, partial = hopper.run(x, w, scale, divisor, out, num_steps, stride, stats, of_hopper)
        if not refused:
            return partial
        _logger.debug("%s of %s runs in plain Triton: %s", op, tuple(x.shape), refused)
    config = dict(config or _config(op, channels, out_channels, size, stride, x.device))
    # No larger than the channels need; 32 is the depth of one tensor core instruction, 16 its least width.
    block_k = min(config.pop("BLOCK_K"), max(32, next_power_of_2(channels)))
    block_n = min(config.pop("BLOCK_N"), max(16, next_power_of_2(out_channels)))
    promoted = config.pop("PROMOTE", 1) and x.dtype != torch.int8
    if transposed:
        rows, kinds = frames * cdiv(out_height, 2) * cdiv(out_width, 2), 4
    else:
        rows, kinds = frames * out_height * out_width, 1
    tiles = cdiv(rows, config["BLOCK_M"])
    partial = torch.empty((tiles, 3, out_channels), dtype=torch.float32, device=x.device) if stats else None
    with on_device(x):
        conv_kernel[(tiles * cdiv(out_channels, block_n), kinds)](
            x,
            w,
            scale,
            divisor,
            out,
            partial,
            frames,
            height,
            width,
            out_height,
            out_width,
            channels,
            out_channels,
            STRIDE=stride,
            TRANSPOSED=transposed,
            STATS=stats,
            IMPRECISE=block_k if promoted else None,
            WHOLE_K=channels % block_k == 0,
            WHOLE_N=out_channels % block_n == 0,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            **config,
        )
    return partial


def forward(
    spikes: Tensor,
    weight: EightBitWeight,
    stride: int,
    dtype: torch.dtype,
    num_steps: int = 1,
    stats: bool = True,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and what `finish_statistics` makes statistics of.

    Args:
        spikes: (N, C, H, W) int8, 0 or 1, dense channels-last.
        weight: Of C to C' channels.
        stride: 1 or 2.
        dtype: Of the output.
        num_steps: T, or any number that divides N: so many frames may share a copy of weights.
        stats: Whether statistics are wanted.
        config: Launch parameters in the place of the tuned ones.

    Returns:
        (N, C', H', W') channels-last, and (parts, 3, C') float32 or None.
    """
    frames, _, height, width = spikes.shape
    size = (frames, len(weight.integers), (height - 1) // stride + 1, (width - 1) // stride + 1)
    out = _empty(*size, dtype, spikes.device)
    partial = _run(
        "eight_bit_forward", spikes, weight.integers, weight.scale, None, out, stride, False, stats, num_steps, config
    )
    return out, partial


def finish_statistics(
    partial: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
    num_batches: Tensor | None = None,
    affine: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and biased variance (C,) of all that `forward` stored; see `batch_stats` for the others.

    Args:
        partial: What `forward` returned.
        running_mean: (C,), brought up to date.
        running_var: Likewise.
        momentum: Of these.
        num_batches: One more is counted.
        affine: Weight, bias and eps of the batch norm.

    Returns:
        Mean, variance and, with ``affine``, scale and shift (2, C) of the batch norm.
    """
    parts, _, channels = partial.shape
    memory = torch.empty((4, channels), dtype=torch.float32, device=partial.device)
    mean, var, found = memory[0], memory[1], None if affine is None else memory[2:]
    weight, bias, eps = affine or (None, None, 0.0)
    with on_device(partial):
        finish_statistics_kernel[(cdiv(channels, _FINISH["BLOCK_C"]),)](
            partial,
            mean,
            var,
            running_mean,
            running_var,
            num_batches,
            weight,
            bias,
            found,
            momentum,
            parts,
            channels,
            EPS=eps,
            UPDATE=running_mean is not None,
            COUNT=num_batches is not None,
            **_FINISH,
        )
    return mean, var, found


def input_gradient(
    gradient: Tensor,
    weight: EightBitWeight,
    divisor: Tensor,
    size: tuple[int, int],
    stride: int,
    dtype: torch.dtype,
    num_steps: int = 1,
    config: dict[str, int] | None = None,
) -> Tensor:
    """The gradient at the convolution's input.

    Args:
        gradient: (N, C', H', W') float8 e4m3, dense channels-last: gradient at the output times scale and divisor.
        weight: Of C to C' channels.
        divisor: One float32 value, a power of two.
        size: H and W.
        stride: 1 or 2.
        dtype: Of the result.
        num_steps: As of `forward`.
        config: Launch parameters in the place of the tuned ones.

    Returns:
        (N, C, H, W) channels-last.
    """
    out = _empty(len(gradient), len(weight.turned), *size, dtype, gradient.device)
    _run(
        "eight_bit_input_gradient",
        gradient,
        weight.turned,
        None,
        divisor,
        out,
        stride,
        stride == 2,
        False,
        num_steps,
        config,
    )
    return out
