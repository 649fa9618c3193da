"""Forward pass and input gradient of a 3x3 convolution with operands of one byte: launches."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, prepared
from ..common.triton import cdiv, next_power_of_2
from ..tuning import shape_config
from . import hopper
from .conv_kernels import conv_kernel, finish_statistics_kernel
from .transposed import prepare_transposed
from .weights import EightBitWeight

_logger = logging.getLogger(__name__)
_FINISH = {"BLOCK_P": 256, "BLOCK_C": 8, "num_warps": 8}


class _Call(NamedTuple):
    """What decides about a launch.

    Attributes:
        op: Whose launch parameters it takes.
        shape: (N, C, H, W) of the operand.
        out_shape: (N, C', H', W') of the output.
        operand: Dtype of the operand.
        dtype: Of the output.
        device: Of all.
        stride: 1 or 2.
        transposed: An input gradient at stride 2.
        stats: Whether statistics are wanted.
        num_steps: T.
        items: Launch parameters in the place of the tuned ones.
    """

    op: str
    shape: torch.Size
    out_shape: tuple[int, int, int, int]
    operand: torch.dtype
    dtype: torch.dtype
    device: torch.device
    stride: int
    transposed: bool
    stats: bool
    num_steps: int
    items: tuple[tuple[str, int], ...] | None

    def config(self, op: str) -> dict[str, int]:
        """Launch parameters of one of the kernels."""
        if self.items is not None:
            return dict(self.items)
        channels, (height, width) = self.shape[1], self.shape[2:] if self.transposed else self.out_shape[2:]
        name = f"{channels}-{self.out_shape[1]}" + (":s2" if self.stride == 2 and not self.transposed else "")
        return dict(shape_config(op, (name, f"{name}@{height}x{width}"), self.device))


@prepared
def _of_hopper(call: _Call) -> hopper.Prepared | str:
    work = hopper.Work(
        shape=call.shape,
        out_shape=torch.Size(call.out_shape),
        operand=call.operand,
        dtype=call.dtype,
        device=call.device,
        num_steps=call.num_steps,
        stride=call.stride,
        stats=call.stats,
    )
    return hopper.prepare(work, call.config(f"{call.op}_hopper"))


@prepared
def _of_triton(call: _Call) -> tuple[Launch, int]:
    """The kernel in plain Triton, and of how many parts its statistics are."""
    frames, channels, height, width = call.shape
    _, out_channels, out_height, out_width = call.out_shape
    config = call.config(call.op)
    # No larger than the channels need; 32 is the depth of one tensor core instruction, 16 its least width.
    block_k = min(config.pop("BLOCK_K"), max(32, next_power_of_2(channels)))
    block_n = min(config.pop("BLOCK_N"), max(16, next_power_of_2(out_channels)))
    promoted = config.pop("PROMOTE", 1) and call.operand != torch.int8
    tiles = cdiv(frames * out_height * out_width, config["BLOCK_M"])
    launch = Launch(
        conv_kernel,
        (tiles * cdiv(out_channels, block_n),),
        call.device,
        (frames, height, width, out_height, out_width, channels, out_channels),
        STRIDE=call.stride,
        STATS=call.stats,
        IMPRECISE=block_k if promoted else None,
        WHOLE_K=channels % block_k == 0,
        WHOLE_N=out_channels % block_n == 0,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **config,
    )
    return launch, tiles


@prepared
def _of_transposed(call: _Call) -> Launch:
    """The kernel of an input gradient at stride 2."""
    return prepare_transposed(call.shape, call.out_shape, call.device, call.config(f"{call.op}_s2"))


def _run(
    call: _Call, x: Tensor, w: Tensor, scale: Tensor | None, divisor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """In Gluon where that applies, else in plain Triton."""
    out = torch.empty(call.out_shape, dtype=call.dtype, device=call.device, memory_format=torch.channels_last)
    if call.transposed:
        _of_transposed(call)(x, w, divisor, out)
        return out, None
    while True:
        found = _of_hopper(call)
        if isinstance(found, str):
            _logger.debug("%s of %s runs in plain Triton: %s", call.op, tuple(call.shape), found)
            break
        partial = _partial(found.parts, call)
        if hopper.run(found, x, w, out, scale, divisor, partial):
            return out, partial
        _of_hopper.cache_clear()  # others of its plans do not compile either
    launch, parts = _of_triton(call)
    partial = _partial(parts, call)
    launch(x, w, scale, divisor, out, partial)
    return out, partial


def _partial(parts: int, call: _Call) -> Tensor | None:
    size = (parts, 3, call.out_shape[1])
    return torch.empty(size, dtype=torch.float32, device=call.device) if call.stats else None


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
    out_shape = (frames, weight.integers.shape[0], (height - 1) // stride + 1, (width - 1) // stride + 1)
    call = _Call(
        "eight_bit_forward",
        spikes.shape,
        out_shape,
        spikes.dtype,
        dtype,
        spikes.device,
        stride,
        transposed=False,
        stats=stats,
        num_steps=num_steps,
        items=None if config is None else tuple(config.items()),
    )
    return _run(call, spikes, weight.integers, weight.scale, None)


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
    launch = _finish(parts, channels, momentum, eps, running_mean is not None, num_batches is not None, partial.device)
    launch(partial, mean, var, running_mean, running_var, num_batches, weight, bias, found)
    return mean, var, found


@prepared
def _finish(
    parts: int, channels: int, momentum: float, eps: float, update: bool, count: bool, device: torch.device
) -> Launch:
    return Launch(
        finish_statistics_kernel,
        (cdiv(channels, _FINISH["BLOCK_C"]),),
        device,
        (momentum, parts, channels),
        EPS=eps,
        UPDATE=update,
        COUNT=count,
        **_FINISH,
    )


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
    call = _Call(
        "eight_bit_input_gradient",
        gradient.shape,
        (gradient.shape[0], weight.turned.shape[0], *size),
        gradient.dtype,
        dtype,
        gradient.device,
        stride,
        transposed=stride == 2,
        stats=False,
        num_steps=num_steps,
        items=None if config is None else tuple(config.items()),
    )
    return _run(call, gradient, weight.turned, None, divisor)[0]
