"""Firing rate of each neuron: the mean of its spikes over time, in one pass, and its gradient in one.

PyTorch reduces the outer axis slower than it adds frames one by one, which is a pass a step; the gradient it would
divide, repeat for every step and, behind a pooling layer, bring into the spikes' memory format, a pass for each.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import DTYPES, check_steps, check_tensor
from ..common.fake import register_fake
from ..common.layout import as_layout, on_device
from ..common.messages import shown
from ..common.tiles import dense, is_channels_last
from ..common.triton import cdiv, launchable, next_power_of_2, tl, triton
from ..derivatives import register_derivatives
from ..reference import firing_rate_reference
from ..tuning import launch_config
from .not_finite import DTYPES as MARKED_DTYPES
from .not_finite import WARPS, blocks_of, mark_not_finite_, reads_sample, zeros_of


@triton.jit
def _rates(s_ptr, at, inside, frame, T: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.zeros((BLOCK,), tl.float32)
    for t in range(T):
        count += tl.load(s_ptr + tl.cast(t, tl.int64) * frame + at, mask=inside, other=0).to(tl.float32)
    return count / T


@triton.jit
def _firing_rate_kernel(x_ptr, y_ptr, frame, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < frame
    rate = _rates(x_ptr, i, inside, frame, T, BLOCK)
    tl.store(y_ptr + i, rate.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _marked_firing_rate_kernel(
    s_ptr,
    x_ptr,
    variance_ptr,
    y_ptr,
    frame,
    places,
    size,
    channels,
    shares,
    T: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of ``shares`` programs of a sample, which divide the blocks of its rates; spikes are (T, B, places)."""
    sample = (tl.program_id(0) // shares).to(tl.int64)
    i = tl.program_id(0) % shares * BLOCK + tl.arange(0, BLOCK)
    zeros = zeros_of(x_ptr, variance_ptr, sample, size, channels, READ)
    rate = _rates(s_ptr, sample * places + i, i < places, frame, T, BLOCK)
    zero = tl.sum(zeros, 0)
    tl.store(y_ptr + sample * places + i, (rate + zero).to(y_ptr.dtype.element_ty), mask=i < places)
    # None where programs are as many as blocks: of few samples.
    for start in range(tl.program_id(0) % shares * BLOCK + shares * BLOCK, places, shares * BLOCK):
        i = start + tl.arange(0, BLOCK)
        rate = _rates(s_ptr, sample * places + i, i < places, frame, T, BLOCK)
        tl.store(y_ptr + sample * places + i, (rate + zero).to(y_ptr.dtype.element_ty), mask=i < places)


@triton.jit
def _firing_rate_backward_kernel(grad_ptr, gx_ptr, frame, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < frame
    share = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32) / T
    for t in range(T):
        tl.store(gx_ptr + tl.cast(t, tl.int64) * frame + i, share.to(gx_ptr.dtype.element_ty), mask=inside)


def _launch(kernel, x: Tensor, source: Tensor, target: Tensor, num_steps: int) -> None:
    config = launch_config("firing_rate", 1, x.element_size(), x.device)
    frame = x.numel() // num_steps
    with on_device(x):
        launchable(kernel)[(cdiv(frame, config["BLOCK"]),)](source, target, frame, T=num_steps, **config)


def _check(x: Tensor, num_steps: int, dtype: torch.dtype | None = None) -> None:
    check_tensor("x", x)
    if x.dim() != 4 or x.dtype not in (*DTYPES, torch.int8):
        raise ValueError(
            f"expected spikes as (T*B, C, H, W), floating-point or int8, got {x.dtype} of shape {tuple(x.shape)}: fold "
            "time with x.flatten(0, 1), convert with x.float()"
        )
    check_steps("x", x, num_steps)
    if not (dtype is None or dtype in DTYPES):
        raise ValueError(
            f"expected dtype None or one of {DTYPES}, got {shown(dtype)}: a rate is no integer, leave it out"
        )


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds these and float32."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _framed(x: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """Unwritten (samples, C, H, W) in the memory format of x, contiguous where x is not dense."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty((samples, *x.shape[1:]), dtype=dtype, device=x.device, memory_format=layout)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("firing_rate(Tensor x, int num_steps, ScalarType? dtype=None) -> Tensor")
_lib.define("firing_rate_backward(Tensor grad, int num_steps, ScalarType dtype, bool channels_last) -> Tensor")


@torch.library.impl(_lib, "firing_rate", "CompositeExplicitAutograd")
def _firing_rate(x, num_steps, dtype=None):
    rate = _firing_rate_fake(x, num_steps, dtype)
    if rate.numel():
        x = dense(x)
        if resolve_backend(x.device, rate.dtype) == "triton":
            _launch(
                kernel=_firing_rate_kernel,
                x=x,
                source=x,
                target=rate,
                num_steps=num_steps,
            )
        else:
            wide = torch.promote_types(rate.dtype, torch.float32)
            count = torch.sum(x.unflatten(0, (num_steps, -1)), 0, dtype=wide)
            rate.copy_(count.div_(num_steps))
    return rate


@register_fake("gac_kernels::firing_rate", lib=_lib)
def _firing_rate_fake(x, num_steps, dtype=None):
    _check(x, num_steps, dtype)
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    return _framed(x, x.shape[0] // num_steps, dtype)


@torch.library.impl(_lib, "firing_rate_backward", "CompositeExplicitAutograd")
def _firing_rate_backward(grad, num_steps, dtype, channels_last):
    gx = _firing_rate_backward_fake(grad, num_steps, dtype, channels_last)
    if gx.numel():
        frames = gx.unflatten(0, (num_steps, -1))
        if resolve_backend(gx.device, dtype) == "triton":
            _launch(
                kernel=_firing_rate_backward_kernel,
                x=gx,
                source=as_layout(grad, frames[0]),
                target=gx,
                num_steps=num_steps,
            )
        else:
            # A gradient in 16 bits at spikes in more is divided in the wider dtype.
            frames.copy_((grad if grad.dtype == dtype else grad.to(_wide(grad.dtype, dtype))) / num_steps)
    return gx


@register_fake("gac_kernels::firing_rate_backward", lib=_lib)
def _firing_rate_backward_fake(grad, num_steps, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (num_steps * grad.shape[0], *grad.shape[1:])
    return torch.empty(size, dtype=dtype, device=grad.device, memory_format=layout)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.num_steps = inputs[:2]
    ctx.dtype, ctx.channels_last = x.dtype, is_channels_last(x)


def _backward(ctx, grad):
    if not ctx.dtype.is_floating_point:
        return None, None, None
    gx = torch.ops.gac_kernels.firing_rate_backward(grad, ctx.num_steps, ctx.dtype, ctx.channels_last)
    return gx, None, None


def _backward_again(ctx, grad):
    if not ctx.dtype.is_floating_point:
        return None, None, None
    share = (grad.to(_wide(grad.dtype, ctx.dtype)) / ctx.num_steps).to(ctx.dtype)
    return share.repeat(ctx.num_steps, 1, 1, 1), None, None


register_derivatives(
    _lib,
    "firing_rate",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=firing_rate_reference,
    defaults=(None,),
)


def firing_rate(x: Tensor, num_steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of time-folded spikes over time, in one pass. Nothing is saved for backward.

    Args:
        x: Spikes (T*B, C, H, W), row ``t * B + b`` being sample b at step t; float32, float16, bfloat16, float64 or
            int8 (without gradient), contiguous or channels-last without a copy.
        num_steps: T.
        dtype: Of the result; None is x's, and float32 for int8.

    Returns:
        (B, C, H, W) in [0, 1], in x's memory format. Spikes are counted in at least float32, then divided by T, then
        rounded.

    Raises:
        ValueError: x has another rank or dtype, T does not divide its first axis, or dtype is no floating one.
    """
    _check(x, num_steps, dtype)
    return torch.ops.gac_kernels.firing_rate(x, num_steps, dtype)


def marked_firing_rate(
    spikes: Tensor, num_steps: int, x: Tensor, variance: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`firing_rate`, with NaN for each sample of a network's input, or for all, where a value is not finite.

    Without gradient. On a GPU one kernel does both where samples of the input are small.

    Args:
        spikes: See `firing_rate`.
        num_steps: T.
        x: (B, ...), the network's input, floating-point.
        variance: (C,), what counts for all samples; None for nothing.
        dtype: See `firing_rate`.

    Returns:
        What `mark_not_finite_` makes of the rates, to the bit.

    Raises:
        ValueError: See `firing_rate`.
    """
    if type(spikes) is Tensor and spikes.device == x.device and reads_sample(x, variance):
        rate = _firing_rate_fake(spikes, num_steps, dtype)
        if rate.numel() and rate.dtype in MARKED_DTYPES and len(rate) == len(x):
            _launch_marked(dense(spikes), num_steps, x, variance, rate)
            return rate
    return mark_not_finite_(torch.ops.gac_kernels.firing_rate(spikes, num_steps, dtype), x, variance)


def _launch_marked(spikes: Tensor, num_steps: int, x: Tensor, variance: Tensor | None, rate: Tensor) -> None:
    samples = len(x)
    places, size = rate.numel() // samples, x.numel() // samples
    block, shares = blocks_of(samples, places, x.device)
    with on_device(spikes):
        _marked_firing_rate_kernel[(samples * shares,)](
            spikes,
            x,
            variance,
            rate,
            rate.numel(),
            places,
            size,
            0 if variance is None else variance.numel(),
            shares,
            T=num_steps,
            READ=next_power_of_2(size),
            BLOCK=block,
            num_warps=WARPS,
        )
