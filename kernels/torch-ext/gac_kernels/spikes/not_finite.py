"""A mark on the outputs of samples whose inputs are not finite, in one pass over both.

Spikes hide such inputs: a comparison with NaN is false, so the first neuron ends it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backend import resolve_backend
from ..common.layout import on_device
from ..common.tiles import multiprocessors
from ..common.triton import cdiv, next_power_of_2, tl, triton

_LARGEST = 2**14  # values a sample that one program reads: 64x64 pixels in 3 channels; PyTorch's sums split more
_BLOCK = 2048  # outputs that a program writes at a time
WARPS = 8
_PER_SM = 8  # programs a multiprocessor: each reads a whole sample, so no more than keep a GPU busy
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def zeros_of(x_ptr, variance_ptr, sample, size, channels, READ: tl.constexpr):
    """READ values of which the sum is 0, or NaN where one of a sample x (size,) or of the variance is not finite.

    Each value is multiplied by 0 before they are added, so that no sum can overflow. READ is at least ``size``: without
    a loop other loads can be on their way meanwhile. A variance (channels,) that is None counts as finite.
    """
    i = tl.arange(0, READ)
    zeros = tl.load(x_ptr + sample * size + i, mask=i < size, other=0.0).to(tl.float32) * 0.0
    if variance_ptr is not None:
        for start in range(0, channels, READ):
            zeros += tl.load(variance_ptr + start + i, mask=start + i < channels, other=0.0).to(tl.float32) * 0.0
    return zeros


@triton.jit
def _mark_kernel(
    x_ptr, variance_ptr, out_ptr, size, out_size, channels, shares, READ: tl.constexpr, BLOCK: tl.constexpr
):
    """One of ``shares`` programs of a sample, which divide the blocks of its outputs."""
    sample = (tl.program_id(0) // shares).to(tl.int64)
    first = tl.program_id(0) % shares * BLOCK
    zero = tl.sum(zeros_of(x_ptr, variance_ptr, sample, size, channels, READ), 0)
    for start in range(first, out_size, shares * BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < out_size
        value = tl.load(out_ptr + sample * out_size + i, mask=inside, other=0.0)
        tl.store(out_ptr + sample * out_size + i, (value.to(tl.float32) + zero).to(value.dtype), mask=inside)


def mark_not_finite_(out: Tensor, x: Tensor, variance: Tensor | None = None) -> Tensor:
    """Add NaN to the outputs of each sample, or of all, where an input is not finite; in place, without gradient.

    On a GPU small samples take one kernel. With PyTorch's two, 8-bit inference of 16 images took 3.7 % longer on an
    H200 than at a commit that had no mark. `marked_firing_rate` takes none.

    Args:
        out: (B, ...), floating-point.
        x: (B, ...), floating-point.
        variance: (C,), what counts for all samples; None for nothing.

    Returns:
        ``out``.
    """
    if _fits(out, x, variance):
        with on_device(x):
            samples = x.shape[0]
            size, out_size = x.numel() // samples, out.numel() // samples
            block, shares = blocks_of(samples, out_size, x.device)
            _mark_kernel[(samples * shares,)](
                x,
                variance,
                out,
                size,
                out_size,
                0 if variance is None else variance.numel(),
                shares,
                READ=next_power_of_2(size),
                BLOCK=block,
                num_warps=WARPS,
            )
        return out
    mark = x.detach().sum(tuple(range(1, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))
    if variance is not None:
        mark = mark + variance.sum()
    # The sum is multiplied before it is rounded, so one beyond float16 does not mark anything.
    return out.add_(mark.view(-1, *[1] * (out.ndim - 1)), alpha=0.0)


def blocks_of(samples: int, out_size: int, device: torch.device) -> tuple[int, int]:
    """Outputs that a program writes at a time, and how many programs divide those of each sample."""
    block = min(_BLOCK, next_power_of_2(out_size))
    return block, min(cdiv(out_size, block), cdiv(_PER_SM * multiprocessors(device), samples))


def reads_sample(x: Tensor, variance: Tensor | None) -> bool:
    """Whether `zeros_of` takes these: real tensors, a sample's values in one piece, few of them.

    Not where something records or differentiates operators, to which a launch without one is invisible.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or not x.numel():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap's tensors have no memory of their own
        return False
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    return (
        all(_readable(one, x.device) for one in ((x,) if variance is None else (x, variance)))
        and x.numel() <= _LARGEST * len(x)
        and resolve_backend(x.device, x.dtype) == "triton"
    )


def _fits(out: Tensor, x: Tensor, variance: Tensor | None) -> bool:
    """Whether the kernel takes these."""
    return reads_sample(x, variance) and type(out) is Tensor and out.numel() > 0 and _readable(out, x.device)


def _readable(x: Tensor, device: torch.device) -> bool:
    """Whether a kernel on the device reads each sample of x as a row of values."""
    in_pieces = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.dtype in DTYPES and x.device == device and in_pieces
