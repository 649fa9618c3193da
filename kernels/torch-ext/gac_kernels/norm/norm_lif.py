"""Batch norm, optional residual and multi-step LIF in one pass: x (T*B, C, H, W) to spikes (T*B, C, H, W).

The statistics come from outside (`batch_stats`, or the running ones). With ``batch_stats=True`` the backward pass
contains what the gradient at x owes to them, so they need no gradient of their own. The residual may have a norm of its
own (the shortcut's), and the spikes can be written as bits beside, which is all that a convolution has to keep of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_norm, check_residual_norm, check_spec
from ..common.layout import as_layout, on_device
from ..common.tiles import FINISH, channel_tiles, dense
from ..common.triton import cdiv
from ..neuron.lif import CHUNK
from ..spec import CIFAR, LIFSpec, ResidualNorm
from ..spikes.bits import empty_bits
from ..tuning import launch_config
from . import eager
from .norm_lif_kernels import apply_kernel, finish_kernel, forward_kernel, reduce_kernel

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_NEURON = "float threshold, float decay, int surrogate, float width, bool detach_reset, bool soft_reset"
_lib.define(
    "norm_lif(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
    f"Tensor? total, float eps, int num_steps, {_NEURON}, bool batch_stats, bool keep_membrane, str group, "
    "Tensor? res_weight=None, Tensor? res_bias=None, Tensor? res_mean=None, Tensor? res_var=None, float res_eps=0.0, "
    "bool pack=False) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "norm_lif_backward(Tensor? grad_spikes, Tensor? grad_membrane, Tensor x, Tensor? residual, Tensor? membrane, "
    "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? total, float eps, int num_steps, "
    f"{_NEURON}, bool batch_stats, bool need_residual, str group, Tensor? res_weight=None, Tensor? res_bias=None, "
    "Tensor? res_mean=None, Tensor? res_var=None, float res_eps=0.0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_triton(
    x, residual, norm, res_norm, eps, res_eps, num_steps, neuron, batch_stats, spikes, membrane, bits
) -> None:
    op = "norm_lif_fwd" if batch_stats else "norm_lif_fwd_eval"
    if batch_stats and residual is not None:
        op += "_normed" if res_norm[2] is not None else "_residual"
    tiles = channel_tiles(x, num_steps, launch_config(op, num_steps, x.element_size(), x.device))
    threshold, decay, _, _, _, soft_reset = neuron
    with on_device(x):
        forward_kernel[tiles.grid](
            x, residual, *norm, *res_norm, spikes, membrane, bits, tiles.rows, tiles.channels, tiles.spatial,
            x.numel() // num_steps, T=num_steps, STEPS=min(num_steps, CHUNK), EPS=eps, R_EPS=res_eps,
            THRESHOLD=threshold, DECAY=decay, SOFT=soft_reset, RESIDUAL=residual is not None,
            NORMED=res_norm[2] is not None, KEEP=membrane.numel() > 0, PACK=bits.numel() > 0, **tiles.meta,
        )  # fmt: skip


def _constants(neuron: tuple) -> dict[str, float | bool]:
    names = ("THRESHOLD", "DECAY", "SURROGATE", "WIDTH", "DETACH", "SOFT")
    return dict(zip(names, neuron, strict=True))


def _backward_triton(
    gs, gy, x, residual, membrane, norm, res_norm, total, eps, res_eps, num_steps, neuron, batch_stats, ga, gx, gw, gb,
    grw, grb, group,
) -> None:  # fmt: skip
    source = residual if membrane is None else membrane
    normed = res_norm[2] is not None
    rows_of_sums = 3 if normed else 2
    frame, size, chunks = x.numel() // num_steps, x.element_size(), cdiv(num_steps, CHUNK)
    kind = "_normed" if normed else "_residual" if source is not None else ""
    config = launch_config(f"norm_lif_bwd_reduce{kind}", min(num_steps, CHUNK), size, x.device)
    if chunks > 1:  # its loops over steps are not unrolled, and only unrolled ones can be overlapped
        config = config | {"STAGES": 1}
    tiles = channel_tiles(x, num_steps, config)
    channels, programs = tiles.channels, tiles.grid[0]
    partial = torch.empty((programs, rows_of_sums, channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((rows_of_sums, channels), dtype=torch.float32, device=x.device)
    scratch = torch.empty(chunks * frame if chunks > 1 else 0, dtype=torch.float32, device=x.device)
    written = ga.numel() > 0
    shared = dict(EPS=eps, R_EPS=res_eps, NORMED=normed, T=num_steps, **_constants(neuron))
    with on_device(x):
        reduce_kernel[tiles.grid](
            gs, gy, x, source, residual, *norm, *res_norm, ga, partial, scratch, tiles.rows, channels, tiles.spatial,
            frame, tiles.tiles, STEPS=min(num_steps, CHUNK), RESIDUAL=residual is not None, KEEP=membrane is not None,
            HAS_GS=gs is not None, HAS_GY=gy is not None, WRITE=written, SUMS=rows_of_sums, **shared, **tiles.meta,
        )  # fmt: skip
        finish_kernel[(cdiv(channels, FINISH["BLOCK_C"]),)](
            partial, norm[3], res_norm[3], sums, gw, gb, grw, grb, programs, channels, EPS=eps, R_EPS=res_eps,
            AFFINE=norm[0] is not None, BIAS=norm[1] is not None, NORMED=normed, SUMS=rows_of_sums, **FINISH,
        )  # fmt: skip
        if group and batch_stats:
            dist.all_reduce(sums, group=eager.resolve_group(group))
        tiles = channel_tiles(x, num_steps, launch_config(f"norm_lif_bwd_apply{kind}", num_steps, size, x.device))
        apply_kernel[tiles.grid](
            ga if written else gs, x, residual, *norm, *res_norm, sums, total, gx, ga, tiles.rows, channels,
            tiles.spatial, frame, tiles.rows * num_steps, BATCH=batch_stats, HAS_TOTAL=total is not None,
            RECOMPUTE=not written, **shared, **tiles.meta,
        )  # fmt: skip


def _outputs(x: Tensor, num_steps: int, keep_membrane: bool, pack: bool) -> tuple[Tensor, Tensor, Tensor]:
    spikes = torch.empty_like(dense(x))
    membrane = torch.empty_like(spikes) if keep_membrane else x.new_empty(0)
    return spikes, membrane, empty_bits(spikes, num_steps) if pack else x.new_empty(0, dtype=torch.uint8)


@torch.library.impl(_lib, "norm_lif", "CompositeExplicitAutograd")
def _norm_lif(
    x, residual, weight, bias, mean, var, total, eps, num_steps, threshold, decay, surrogate, width, detach_reset,
    soft_reset, batch_stats, keep_membrane, group, res_weight=None, res_bias=None, res_mean=None, res_var=None,
    res_eps=0.0, pack=False,
):  # fmt: skip
    check_norm(x, residual, weight, bias, mean, var, num_steps, batch_stats)
    res_norm = (res_weight, res_bias, res_mean, res_var)
    check_residual_norm(x, residual, weight, *res_norm, group)
    spikes, membrane, bits = _outputs(x, num_steps, keep_membrane, pack)
    if x.numel():
        shortcut = None if residual is None else as_layout(residual, spikes)
        neuron = (threshold, decay, surrogate, width, detach_reset, soft_reset)
        run = _forward_triton if resolve_backend(x.device, x.dtype) == "triton" else eager.forward
        run(
            dense(x), shortcut, (weight, bias, mean, var), res_norm, eps, res_eps, num_steps, neuron, batch_stats,
            spikes, membrane, bits,
        )  # fmt: skip
    return spikes, membrane, bits


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, res_weight: Tensor | None, written: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unwritten gradients at x, at the residual, weights and biases; what is not needed has no elements."""
    gx = torch.empty_like(dense(x))
    ga = torch.empty_like(gx) if written else x.new_empty(0)
    gw, gb, grw = (x.new_empty(0) if v is None else torch.empty_like(v) for v in (weight, bias, res_weight))
    return gx, ga, gw, gb, grw, torch.empty_like(grw)


@torch.library.impl(_lib, "norm_lif_backward", "CompositeExplicitAutograd")
def _norm_lif_backward(
    grad_spikes, grad_membrane, x, residual, membrane, weight, bias, mean, var, total, eps, num_steps, threshold,
    decay, surrogate, width, detach_reset, soft_reset, batch_stats, need_residual, group, res_weight=None,
    res_bias=None, res_mean=None, res_var=None, res_eps=0.0,
):  # fmt: skip
    # The second pass recomputes where that costs no more than reading the gradient at the current back.
    written = need_residual or residual is not None or membrane is not None or num_steps > CHUNK or grad_spikes is None
    gx, ga, gw, gb, grw, grb = _gradients(x, weight, bias, res_weight, written)
    if x.numel():
        gs, gy, shortcut, kept = (
            None if tensor is None else as_layout(tensor, gx)
            for tensor in (grad_spikes, grad_membrane, residual, membrane)
        )
        neuron = (threshold, decay, surrogate, width, detach_reset, soft_reset)
        run = _backward_triton if resolve_backend(x.device, x.dtype) == "triton" else eager.backward
        run(
            gs, gy, dense(x), shortcut, kept, (weight, bias, mean, var), (res_weight, res_bias, res_mean, res_var),
            total, eps, res_eps, num_steps, neuron, batch_stats, ga, gx, gw, gb, grw, grb, group,
        )  # fmt: skip
    else:
        for gradient in (gw, gb, grw, grb):
            gradient.zero_()
    return gx, ga if need_residual else ga.new_empty(0), gw, gb, grw, grb


@torch.library.register_fake("gac_kernels::norm_lif", lib=_lib)
def _norm_lif_fake(
    x, residual, weight, bias, mean, var, total, eps, num_steps, threshold, decay, surrogate, width, detach_reset,
    soft_reset, batch_stats, keep_membrane, group, res_weight=None, res_bias=None, res_mean=None, res_var=None,
    res_eps=0.0, pack=False,
):  # fmt: skip
    return _outputs(x, num_steps, keep_membrane, pack)


@torch.library.register_fake("gac_kernels::norm_lif_backward", lib=_lib)
def _norm_lif_backward_fake(
    grad_spikes, grad_membrane, x, residual, membrane, weight, bias, mean, var, total, eps, num_steps, threshold,
    decay, surrogate, width, detach_reset, soft_reset, batch_stats, need_residual, group, res_weight=None,
    res_bias=None, res_mean=None, res_var=None, res_eps=0.0,
):  # fmt: skip
    return _gradients(x, weight, bias, res_weight, need_residual)


_OP = torch.ops.gac_kernels.norm_lif.default


class _NormLIF(torch.autograd.Function):
    """The op's autograd. `torch.library.register_autograd` would do, but it takes as long as all of the op's launches.

    It looks up the default of each of the op's 24 arguments anew in its schema, a third of a millisecond a call.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            spikes, membrane, bits = _OP(*args)
        x, residual, weight, bias, mean, var, total, *rest = args
        *ctx.args, ctx.batch_stats, ctx.keep_membrane, ctx.group = rest[:-6]
        *res_norm, ctx.res_eps, _ = rest[-6:]
        ctx.has_residual, ctx.normed = residual is not None, res_norm[2] is not None
        ctx.has_weight, ctx.has_bias = weight is not None, bias is not None
        ctx.set_materialize_grads(False)
        # The stored current stands for the residual too: where it is kept, the residual serves its own norm only.
        residual = None if ctx.keep_membrane and not ctx.normed else residual
        kept = membrane if ctx.keep_membrane else None
        ctx.mark_non_differentiable(bits)
        ctx.save_for_backward(x, residual, kept, weight, bias, mean, var, total, *res_norm)
        return spikes, membrane, bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_spikes, grad_membrane, _ = grads
        if not ctx.keep_membrane:
            grad_membrane = None
        if grad_spikes is None and grad_membrane is None:
            return (None,) * 24
        x, residual, membrane, weight, bias, mean, var, total, *res_norm = ctx.saved_tensors
        gx, ga, gw, gb, grw, grb = torch.ops.gac_kernels.norm_lif_backward(
            grad_spikes, grad_membrane, x, residual, membrane, weight, bias, mean, var, total, *ctx.args,
            ctx.batch_stats, ctx.has_residual, ctx.group, *res_norm, ctx.res_eps,
        )  # fmt: skip
        of_norm = (gw if ctx.has_weight else None, gb if ctx.has_bias else None)
        of_residual_norm = (grw, grb) if ctx.has_weight and ctx.normed else (None, None)
        return gx, ga if ctx.has_residual else None, *of_norm, *[None] * 14, *of_residual_norm, *[None] * 4


@torch.library.impl(_lib, "norm_lif", "Autograd")
def _norm_lif_autograd(
    x, residual, weight, bias, mean, var, total, eps, num_steps, threshold, decay, surrogate, width, detach_reset,
    soft_reset, batch_stats, keep_membrane, group, res_weight=None, res_bias=None, res_mean=None, res_var=None,
    res_eps=0.0, pack=False,
):  # fmt: skip
    args = (
        x, residual, weight, bias, mean, var, total, eps, num_steps, threshold, decay, surrogate, width, detach_reset,
        soft_reset, batch_stats, keep_membrane, group, res_weight, res_bias, res_mean, res_var, res_eps, pack,
    )  # fmt: skip
    differentiable = (x, residual, weight, bias, res_weight, res_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return _NormLIF.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(*args)


def norm_lif(
    x: Tensor, mean: Tensor | None, var: Tensor | None, num_steps: int, spec: LIFSpec = CIFAR, *,
    weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5,
    batch_stats: bool = False, return_membrane: bool = False, residual_norm: ResidualNorm | None = None,
    return_bits: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """``lif((x - mean) / sqrt(var + eps) * weight + bias + residual)`` over T steps, in one pass over x.

    Args:
        x: (T*B, C, H, W), row ``t * B + b`` being sample b at step t; float32, float16, bfloat16 or float64; contiguous
            or channels-last without a copy.
        mean: (C,), of the batch (`batch_stats`) or running; None, with var, for no normalisation.
        var: (C,), likewise, biased.
        num_steps: T.
        spec: Dynamics and surrogate gradient.
        weight: (C,) scale, with ``bias``; 1 if None, as it has to be without normalisation.
        bias: (C,) shift; 0 if None.
        residual: Shape and dtype of x, added to the norm's output.
        eps: Added to the variance.
        batch_stats: mean and var are those of x itself, and the gradient at x takes account of that.
        return_membrane: Return the neuron's input current, ``norm(x) + residual``, as well.
        residual_norm: Statistics, scale and shift of a batch norm of the residual, applied to it here; its statistics
            are those of the residual itself where ``batch_stats`` says so of x's.
        return_bits: Return the spikes bit-packed as well, as `pack_spikes` gives them.

    Returns:
        Spikes (T*B, C, H, W), 0 or 1, in x's dtype and memory format; with ``return_membrane`` the current before them,
        with ``return_bits`` the bits behind them, in a tuple. The current is computed in float32 (float64 for float64);
        where it is returned, it is rounded to x's dtype before the neuron sees it.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device, or T does not divide the first axis.
    """
    check_spec(spec)
    check_norm(x, residual, weight, bias, mean, var, num_steps, batch_stats)
    res_norm = residual_norm or ResidualNorm(None, None)
    res_args = (res_norm.weight, res_norm.bias, res_norm.mean, res_norm.var)
    check_residual_norm(x, residual, weight, *res_args)
    spikes, membrane, bits = torch.ops.gac_kernels.norm_lif(
        x, residual, weight, bias, mean, var, None, eps, num_steps, *spec.op_arguments, batch_stats, return_membrane,
        "", *res_args, res_norm.eps, return_bits,
    )  # fmt: skip
    if not (return_membrane or return_bits):
        return spikes
    return (*([membrane] if return_membrane else []), spikes, *([bits] if return_bits else []))
