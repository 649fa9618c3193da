"""Mean and maximum of each frame in one read, and their gradient in one pass.

PyTorch reads the frames once for each, and its gradient of a maximum finds and counts the equal elements anew, so the
backward pass is seven passes over the frames. Here forward counts them on the way. Each program leaves the sum, the
maximum and its count of one block of a frame, and a second kernel puts these together in a fixed order: no atomics, so
the same bits every time. A frame is walked in its own memory order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_tensor
from ..common.fake import register_fake
from ..common.layout import on_device
from ..common.tiles import dense
from ..common.triton import cdiv, launchable, tl, triton
from ..derivatives import differentiable_gradients, register_derivatives
from ..reference import pool_frames_reference, state_dtype
from ..tuning import launch_config

_FRAME = (1, 2, 3)
# One warp a frame: there are a few hundred partial results of it at most, and a launch needs no more to be short.
_FINISH = {"BLOCK": 256, "num_warps": 1}


@triton.jit
def _block(size, tiles, BLOCK: tl.constexpr):
    """The program's sample, offsets [BLOCK] into x, and which of them lie in the sample."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    return sample, sample * size + first + i, i < size - first


@triton.jit
def _maximum(x, total):
    """The largest of x, NaN where it has one; ``total`` is its sum. `tl.max` leaves NaN out."""
    top = tl.max(x, 0)
    if total != total:  # a NaN, or infinities of both signs
        top = tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), top)
    return top


@triton.jit
def _pool_frames_kernel(x_ptr, partial_ptr, size, tiles, BLOCK: tl.constexpr):
    _, at, inside = _block(size, tiles, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(x, 0)
    top = _maximum(tl.where(inside, x, float("-inf")), total)
    partial_ptr += tl.program_id(0)
    tl.store(partial_ptr, total)
    tl.store(partial_ptr + tl.num_programs(0), top)
    tl.store(partial_ptr + 2 * tl.num_programs(0), tl.sum((inside & (x == top)).to(tl.float32), 0))


@triton.jit
def _pool_frames_finish_kernel(
    partial_ptr, mean_ptr, maximum_ptr, ties_ptr, size, tiles, programs, BLOCK: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    ties = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, tiles, BLOCK):
        i = first + tl.arange(0, BLOCK)
        at = partial_ptr + sample * tiles + i
        total += tl.load(at, mask=i < tiles, other=0.0)
        here = tl.load(at + programs, mask=i < tiles, other=float("-inf"))
        count = tl.load(at + 2 * programs, mask=i < tiles, other=0.0)
        before, top = top, tl.maximum(top, here, propagate_nan=tl.PropagateNan.ALL)
        ties = tl.where(before == top, ties, 0.0) + tl.where(here == top, count, 0.0)
    of_frame = tl.sum(total, 0)
    maximum = _maximum(top, of_frame)
    tl.store(mean_ptr + sample, of_frame / size)
    tl.store(maximum_ptr + sample, maximum.to(maximum_ptr.dtype.element_ty))
    tl.store(ties_ptr + sample, tl.sum(tl.where(top == maximum, ties, 0.0), 0))


@triton.jit
def _pool_frames_backward_kernel(
    grad_mean_ptr, grad_maximum_ptr, x_ptr, maximum_ptr, ties_ptr, gx_ptr, size, tiles, BLOCK: tl.constexpr
):
    sample, at, inside = _block(size, tiles, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    maximum = tl.load(maximum_ptr + sample).to(tl.float32)
    everywhere = tl.load(grad_mean_ptr + sample) / size
    share = tl.load(grad_maximum_ptr + sample).to(tl.float32) / tl.load(ties_ptr + sample)
    # 0 * share: as in PyTorch a frame with a NaN, whose maximum equals no element, has NaN for a gradient.
    gx = tl.where(x == maximum, everywhere + share, everywhere + 0.0 * share)
    tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=inside)


def _geometry(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Elements and programs of a frame, and launch parameters."""
    config = launch_config("pool_frames", 1, x.element_size(), x.device)
    size = x.shape[1:].numel()
    return size, cdiv(size, config["BLOCK"]), config


def _forward_triton(x: Tensor, mean: Tensor, maximum: Tensor, ties: Tensor) -> None:
    size, tiles, config = _geometry(x)
    programs = x.shape[0] * tiles
    partial = torch.empty((3, programs), dtype=torch.float32, device=x.device)
    with on_device(x):
        launchable(_pool_frames_kernel)[(programs,)](x, partial, size, tiles, **config)
        launchable(_pool_frames_finish_kernel)[(x.shape[0],)](
            partial, mean, maximum, ties, size, tiles, programs, **_FINISH
        )


def _backward_triton(
    grad_mean: Tensor, grad_maximum: Tensor, x: Tensor, maximum: Tensor, ties: Tensor, gx: Tensor
) -> None:
    size, tiles, config = _geometry(x)
    with on_device(x):
        _pool_frames_backward_kernel[(x.shape[0] * tiles,)](
            grad_mean, grad_maximum, x, maximum, ties, gx, size, tiles, **config
        )


def _over_frame(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def _forward_eager(x: Tensor, mean: Tensor, maximum: Tensor, ties: Tensor) -> None:
    torch.mean(x, _FRAME, dtype=mean.dtype, out=mean)
    torch.amax(x, _FRAME, out=maximum)
    # As numbers, not bools, which a CPU adds up seven times as slowly.
    equal = torch.eq(x, _over_frame(maximum), out=torch.empty_like(x))
    torch.sum(equal, _FRAME, dtype=ties.dtype, out=ties)


def _backward_eager(
    grad_mean: Tensor, grad_maximum: Tensor, x: Tensor, maximum: Tensor, ties: Tensor, gx: Tensor
) -> None:
    everywhere, share = grad_mean / x.shape[1:].numel(), grad_maximum / ties
    there, elsewhere = (_over_frame((everywhere + share * here).to(x.dtype)) for here in (1, 0))
    torch.where(x == _over_frame(maximum), there, elsewhere, out=gx)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("pool_frames(Tensor x) -> (Tensor, Tensor, Tensor)")
_lib.define(
    "pool_frames_backward(Tensor grad_mean, Tensor grad_maximum, Tensor x, Tensor maximum, Tensor ties) -> Tensor"
)


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten mean, maximum and number of elements equal to it, (N,) each."""
    check_current("x", x, min_dims=4, max_dims=4)
    if 0 in x.shape[1:]:
        raise ValueError(
            f"expected frames of at least one element, got shape {tuple(x.shape)}: nothing has no maximum, give C, H "
            "and W of at least 1"
        )
    mean = x.new_empty(x.shape[0], dtype=state_dtype(x.dtype))
    return mean, x.new_empty(x.shape[0]), torch.empty_like(mean)


@torch.library.impl(_lib, "pool_frames", "CompositeExplicitAutograd")
def _pool_frames(x):
    mean, maximum, ties = _results(x)
    if x.shape[0]:
        run = _forward_triton if resolve_backend(x.device, x.dtype) == "triton" else _forward_eager
        run(dense(x), mean, maximum, ties)
    return mean, maximum, ties


@torch.library.impl(_lib, "pool_frames_backward", "CompositeExplicitAutograd")
def _pool_frames_backward(grad_mean, grad_maximum, x, maximum, ties):
    x = dense(x)
    gx = torch.empty_like(x)
    if x.shape[0]:
        run = _backward_triton if resolve_backend(x.device, x.dtype) == "triton" else _backward_eager
        run(grad_mean.contiguous(), grad_maximum.contiguous(), x, maximum, ties, gx)
    return gx


@register_fake("gac_kernels::pool_frames", lib=_lib)
def _pool_frames_fake(x):
    return _results(x)


@register_fake("gac_kernels::pool_frames_backward", lib=_lib)
def _pool_frames_backward_fake(grad_mean, grad_maximum, x, maximum, ties):
    return torch.empty_like(dense(x))


def _setup_context(ctx, inputs, output) -> None:
    (x,), (_, maximum, ties) = inputs, output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ties)
    ctx.save_for_backward(x, maximum, ties)


def _backward(ctx, grad_mean, grad_maximum, _):
    x, maximum, ties = ctx.saved_tensors
    if grad_maximum is None:  # the mean alone: the same value everywhere, which needs no pass
        if grad_mean is None:
            return (None,)
        return (_over_frame((grad_mean / x.shape[1:].numel()).to(x.dtype)).expand(x.shape),)
    if grad_mean is None:
        grad_mean = torch.zeros_like(ties)
    return (torch.ops.gac_kernels.pool_frames_backward(grad_mean, grad_maximum, x, maximum, ties),)


def _backward_again(ctx, grad_mean, grad_maximum, _):
    return tuple(differentiable_gradients(pool_frames_reference, ctx.saved_tensors[:1], (grad_mean, grad_maximum)))


def _definition(x):
    mean, maximum = pool_frames_reference(x)
    return mean, maximum, (x == _over_frame(maximum)).sum(_FRAME, dtype=mean.dtype)


register_derivatives(
    _lib,
    "pool_frames",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=_definition,
)


def pool_frames(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum of each frame over channels and space, in one read.

    As ``x.mean((1, 2, 3))``, taken in at least float32, and ``x.amax((1, 2, 3))``; a NaN makes both NaN. The gradient
    at x is one pass; that of the maximum is shared evenly by all elements equal to it, as PyTorch's is. Both are
    deterministic. Saved for backward: x.

    Args:
        x: (N, C, H, W), float32, float16, bfloat16 or float64, contiguous or channels-last without a copy.

    Returns:
        Mean (N,) in float32 (float64 for float64) and maximum (N,) in x's dtype.

    Raises:
        ValueError: x is no floating tensor of four axes, or C, H or W is 0.
    """
    check_tensor("x", x)
    mean, maximum, _ = torch.ops.gac_kernels.pool_frames(x)
    return mean, maximum
