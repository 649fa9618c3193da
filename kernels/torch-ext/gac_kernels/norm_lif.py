"""Batch norm, optional residual and multi-step LIF in one pass: x (T*B, C, H, W) to spikes (T*B, C, H, W).

The statistics come from outside (`batch_stats`, or the running ones). With ``batch_stats=True`` the backward pass
contains what the gradient at x owes to them, so they need no gradient of their own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import norm_eager
from ._triton import triton
from .backend import resolve_backend
from .checks import check_norm, check_spec
from .layout import as_layout, on_device
from .lif import CHUNK
from .norm_lif_kernels import apply_kernel, finish_kernel, forward_kernel, reduce_kernel
from .spec import CIFAR, LIFSpec
from .tiles import channel_tiles, dense
from .tuning import launch_config

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_NEURON = "float threshold, float decay, int surrogate, float width, bool detach_reset, bool soft_reset"
_lib.define(
    "norm_lif(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? total, "
    f"float eps, int num_steps, {_NEURON}, bool batch_stats, bool keep_membrane, str group) -> (Tensor, Tensor)"
)
_lib.define(
    "norm_lif_backward(Tensor? grad_spikes, Tensor? grad_membrane, Tensor x, Tensor? residual, Tensor? membrane, "
    "Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? total, float eps, int num_steps, "
    f"{_NEURON}, bool batch_stats, bool need_residual, str group) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward_triton(x, residual, norm, eps, num_steps, neuron, spikes, membrane) -> None:
    tiles = channel_tiles(x, num_steps, launch_config("norm_lif_fwd", num_steps, x.element_size(), x.device))
    threshold, decay, _, _, _, soft_reset = neuron
    with on_device(x):
        forward_kernel[tiles.grid](
            x, residual, *norm, spikes, membrane, tiles.rows, tiles.channels, tiles.spatial, x.numel() // num_steps,
            T=num_steps, STEPS=min(num_steps, CHUNK), EPS=eps, THRESHOLD=threshold, DECAY=decay, SOFT=soft_reset,
            AFFINE=norm[0] is not None, RESIDUAL=residual is not None, KEEP=membrane.numel() > 0, **tiles.meta,
        )  # fmt: skip


def _constants(neuron: tuple) -> dict[str, float | bool]:
    names = ("THRESHOLD", "DECAY", "SURROGATE", "WIDTH", "DETACH", "SOFT")
    return dict(zip(names, neuron, strict=True))


def _backward_triton(
    gs, gy, x, residual, membrane, norm, total, eps, num_steps, neuron, batch_stats, ga, gx, gw, gb, group
) -> None:
    source = residual if membrane is None else membrane
    frame, size, chunks = x.numel() // num_steps, x.element_size(), triton.cdiv(num_steps, CHUNK)
    tiles = channel_tiles(x, num_steps, launch_config("norm_lif_bwd_reduce", num_steps, size, x.device))
    channels, programs = tiles.channels, tiles.grid[0]
    partial = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    scratch = torch.empty(chunks * frame if chunks > 1 else 0, dtype=torch.float32, device=x.device)
    affine, written = norm[0] is not None, ga.numel() > 0
    shared = dict(EPS=eps, AFFINE=affine, T=num_steps, **_constants(neuron))
    with on_device(x):
        reduce_kernel[tiles.grid](
            gs, gy, x, source, *norm, ga, partial, scratch, tiles.rows, channels, tiles.spatial, frame, tiles.tiles,
            STEPS=min(num_steps, CHUNK), RESIDUAL=residual is not None, KEEP=membrane is not None,
            HAS_GS=gs is not None, HAS_GY=gy is not None, WRITE=written, **shared, **tiles.meta,
        )  # fmt: skip
        finish_kernel[(triton.cdiv(channels, 16),)](
            partial, norm[3], sums, gw, gb, programs, channels, EPS=eps, AFFINE=affine, BLOCK_P=64, BLOCK_C=16,
            num_warps=4,
        )  # fmt: skip
        if group and batch_stats:
            dist.all_reduce(sums, group=norm_eager.resolve_group(group))
        tiles = channel_tiles(x, num_steps, launch_config("norm_lif_bwd_apply", num_steps, size, x.device))
        apply_kernel[tiles.grid](
            ga if written else gs, x, *norm, sums, total, gx, tiles.rows, channels, tiles.spatial, frame,
            tiles.rows * num_steps, BATCH=batch_stats, HAS_TOTAL=total is not None, RECOMPUTE=not written, **shared,
            **tiles.meta,
        )  # fmt: skip


def _outputs(x: Tensor, keep_membrane: bool) -> tuple[Tensor, Tensor]:
    spikes = torch.empty_like(dense(x))
    return spikes, torch.empty_like(spikes) if keep_membrane else x.new_empty(0)


@torch.library.impl(_lib, "norm_lif", "CompositeExplicitAutograd")
def _norm_lif(
    x, residual, weight, bias, mean, var, total, eps, num_steps, threshold, decay, surrogate, width, detach_reset,
    soft_reset, batch_stats, keep_membrane, group,
):  # fmt: skip
    check_norm(x, residual, weight, bias, mean, var, num_steps)
    spikes, membrane = _outputs(x, keep_membrane)
    if x.numel():
        shortcut = None if residual is None else as_layout(residual, spikes)
        neuron = (threshold, decay, surrogate, width, detach_reset, soft_reset)
        run = _forward_triton if resolve_backend(x.device, x.dtype) == "triton" else norm_eager.forward
        run(dense(x), shortcut, (weight, bias, mean, var), eps, num_steps, neuron, spikes, membrane)
    return spikes, membrane


def _gradients(x: Tensor, weight: Tensor | None, written: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten gradients at x, at the residual, weight and bias; what is not needed has no elements."""
    gx = torch.empty_like(dense(x))
    gw = x.new_empty(0) if weight is None else torch.empty_like(weight)
    return gx, torch.empty_like(gx) if written else x.new_empty(0), gw, torch.empty_like(gw)


@torch.library.impl(_lib, "norm_lif_backward", "CompositeExplicitAutograd")
def _norm_lif_backward(
    grad_spikes, grad_membrane, x, residual, membrane, weight, bias, mean, var, total, eps, num_steps, threshold,
    decay, surrogate, width, detach_reset, soft_reset, batch_stats, need_residual, group,
):  # fmt: skip
    # The second pass recomputes where that costs no more than reading the gradient at the current back.
    written = need_residual or residual is not None or membrane is not None or num_steps > CHUNK or grad_spikes is None
    gx, ga, gw, gb = _gradients(x, weight, written)
    if x.numel():
        gs, gy, shortcut, kept = (
            None if tensor is None else as_layout(tensor, gx)
            for tensor in (grad_spikes, grad_membrane, residual, membrane)
        )
        neuron = (threshold, decay, surrogate, width, detach_reset, soft_reset)
        run = _backward_triton if resolve_backend(x.device, x.dtype) == "triton" else norm_eager.backward
        run(
            gs, gy, dense(x), shortcut, kept, (weight, bias, mean, var), total, eps, num_steps, neuron, batch_stats,
            ga, gx, gw, gb, group,
        )  # fmt: skip
    else:
        gw.zero_()
        gb.zero_()
    return gx, ga if need_residual else ga.new_empty(0), gw, gb


@torch.library.register_fake("gac_kernels::norm_lif", lib=_lib)
def _norm_lif_fake(
    x, residual, weight, bias, mean, var, total, eps, num_steps, threshold, decay, surrogate, width, detach_reset,
    soft_reset, batch_stats, keep_membrane, group,
):  # fmt: skip
    return _outputs(x, keep_membrane)


@torch.library.register_fake("gac_kernels::norm_lif_backward", lib=_lib)
def _norm_lif_backward_fake(
    grad_spikes, grad_membrane, x, residual, membrane, weight, bias, mean, var, total, eps, num_steps, threshold,
    decay, surrogate, width, detach_reset, soft_reset, batch_stats, need_residual, group,
):  # fmt: skip
    return _gradients(x, weight, need_residual)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, mean, var, total, *ctx.args, ctx.batch_stats, ctx.keep_membrane, ctx.group = inputs
    ctx.has_residual, ctx.affine = residual is not None, weight is not None
    ctx.set_materialize_grads(False)
    # The stored current stands for the residual too: where it is kept, the residual is not needed any more.
    membrane = output[1] if ctx.keep_membrane else None
    residual = None if ctx.keep_membrane else residual
    ctx.save_for_backward(x, residual, membrane, weight, bias, mean, var, total)


def _autograd(ctx, grad_spikes, grad_membrane):
    if not ctx.keep_membrane:
        grad_membrane = None
    if grad_spikes is None and grad_membrane is None:
        return (None,) * 18
    x, residual, membrane, weight, bias, mean, var, total = ctx.saved_tensors
    gx, ga, gw, gb = torch.ops.gac_kernels.norm_lif_backward(
        grad_spikes, grad_membrane, x, residual, membrane, weight, bias, mean, var, total, *ctx.args, ctx.batch_stats,
        ctx.has_residual, ctx.group,
    )  # fmt: skip
    of_norm = (gw, gb) if ctx.affine else (None, None)
    return gx, ga if ctx.has_residual else None, *of_norm, *[None] * 14


torch.library.register_autograd("gac_kernels::norm_lif", _autograd, setup_context=_setup_context, lib=_lib)


def norm_lif(
    x: Tensor, mean: Tensor, var: Tensor, num_steps: int, spec: LIFSpec = CIFAR, *, weight: Tensor | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5, batch_stats: bool = False,
    return_membrane: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``lif((x - mean) / sqrt(var + eps) * weight + bias + residual)`` over T steps, in one pass over x.

    Args:
        x: (T*B, C, H, W), row ``t * B + b`` being sample b at step t; float32, float16, bfloat16 or float64; contiguous
            or channels-last without a copy.
        mean: (C,), of the batch (`batch_stats`) or running.
        var: (C,), likewise, biased.
        num_steps: T.
        spec: Dynamics and surrogate gradient.
        weight: (C,) scale, with ``bias``; 1 if None.
        bias: (C,) shift; 0 if None.
        residual: Shape and dtype of x, added to the norm's output.
        eps: Added to the variance.
        batch_stats: mean and var are those of x itself, and the gradient at x takes account of that.
        return_membrane: Return the neuron's input current, ``norm(x) + residual``, as well.

    Returns:
        Spikes (T*B, C, H, W), 0 or 1, in x's dtype and memory format; with ``return_membrane`` the pair (current,
        spikes). The current is computed in float32 (float64 for float64); where it is returned, it is rounded to x's
        dtype before the neuron sees it.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device, or T does not divide the first axis.
    """
    check_spec(spec)
    check_norm(x, residual, weight, bias, mean, var, num_steps)
    spikes, membrane = torch.ops.gac_kernels.norm_lif(
        x, residual, weight, bias, mean, var, None, eps, num_steps, spec.threshold, spec.decay, spec.surrogate_id,
        spec.width, spec.detach_reset, spec.soft_reset, batch_stats, return_membrane, "",
    )  # fmt: skip
    return (membrane, spikes) if return_membrane else spikes
