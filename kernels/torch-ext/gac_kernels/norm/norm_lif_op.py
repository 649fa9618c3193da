"""The operators of `norm_lif` and `norm_lif_backward`: schemas, calls of the kernels, shapes, and derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_norm, check_residual_norm
from ..common.fake import register_fake
from ..common.layout import as_layout
from ..common.tiles import dense
from ..derivatives import Gradients, register_derivatives
from ..neuron.lif import CHUNK
from ..neuron.values import check_binary, check_learnable, check_values
from ..spikes.bits import empty_bits
from . import eager
from .derivatives import backward_again, definition
from .launch import backward_triton, forward_triton

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_NEURON = "float threshold, float decay, int surrogate, float width, bool detach_reset, bool soft_reset"
_lib.define(
    "norm_lif(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
    f"Tensor? total, float eps, int num_steps, {_NEURON}, bool batch_stats, bool keep_membrane, str group, "
    "Tensor? res_weight=None, Tensor? res_bias=None, Tensor? res_mean=None, Tensor? res_var=None, float res_eps=0.0, "
    "bool pack=False, Tensor? values=None) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "norm_lif_backward(Tensor? grad_spikes, Tensor? grad_membrane, Tensor x, Tensor? residual, Tensor? membrane, "
    "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? total, float eps, int num_steps, "
    f"{_NEURON}, bool batch_stats, bool need_residual, str group, Tensor? res_weight=None, Tensor? res_bias=None, "
    "Tensor? res_mean=None, Tensor? res_var=None, float res_eps=0.0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "norm_lif_backward_learned(Tensor? grad_spikes, Tensor? grad_membrane, Tensor x, Tensor? residual, "
    "Tensor? membrane, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? total, float eps, "
    f"int num_steps, {_NEURON}, bool batch_stats, bool need_residual, str group, Tensor? res_weight, "
    "Tensor? res_bias, Tensor? res_mean, Tensor? res_var, float res_eps, Tensor values) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _outputs(x: Tensor, num_steps: int, keep_membrane: bool, pack: bool) -> tuple[Tensor, Tensor, Tensor]:
    spikes = torch.empty_like(dense(x))
    membrane = torch.empty_like(spikes) if keep_membrane else x.new_empty(0)
    return spikes, membrane, empty_bits(spikes, num_steps) if pack else x.new_empty(0, dtype=torch.uint8)


@torch.library.impl(_lib, "norm_lif", "CompositeExplicitAutograd")
def _norm_lif(
    x,
    residual,
    weight,
    bias,
    mean,
    var,
    total,
    eps,
    num_steps,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
    batch_stats,
    keep_membrane,
    group,
    res_weight=None,
    res_bias=None,
    res_mean=None,
    res_var=None,
    res_eps=0.0,
    pack=False,
    values=None,
):
    check_norm(
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        mean=mean,
        var=var,
        num_steps=num_steps,
        batch_stats=batch_stats,
    )
    res_norm = (res_weight, res_bias, res_mean, res_var)
    check_residual_norm(x, residual, weight, *res_norm, group)
    if values is not None:
        check_values(values, length=x.shape[1])
        check_learnable(surrogate)
    if pack:
        check_binary(surrogate)
    spikes, membrane, bits = _outputs(x, num_steps, keep_membrane, pack)
    if x.numel():
        shortcut = None if residual is None else as_layout(residual, spikes)
        neuron = (threshold, decay, surrogate, width, detach_reset, soft_reset)
        run = forward_triton if resolve_backend(x.device, x.dtype) == "triton" else eager.forward
        run(
            dense(x),
            shortcut,
            (weight, bias, mean, var),
            res_norm,
            eps,
            res_eps,
            num_steps,
            neuron,
            batch_stats,
            spikes,
            membrane,
            bits,
            None if values is None else values.contiguous(),
        )
    return spikes, membrane, bits


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, res_weight: Tensor | None, written: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unwritten gradients at x, at the residual, weights and biases; what is not needed has no elements."""
    gx = torch.empty_like(dense(x))
    ga = torch.empty_like(gx) if written else x.new_empty(0)
    gw, gb, grw = (x.new_empty(0) if v is None else torch.empty_like(v) for v in (weight, bias, res_weight))
    return gx, ga, gw, gb, grw, torch.empty_like(grw)


@torch.library.impl(_lib, "norm_lif_backward_learned", "CompositeExplicitAutograd")
def _norm_lif_backward_learned(*args: Any):
    *rest, values = args
    grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
    run: Any = _norm_lif_backward
    return *run(*rest, values.contiguous(), grad_values), grad_values


@torch.library.impl(_lib, "norm_lif_backward", "CompositeExplicitAutograd")
def _norm_lif_backward(
    grad_spikes,
    grad_membrane,
    x,
    residual,
    membrane,
    weight,
    bias,
    mean,
    var,
    total,
    eps,
    num_steps,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
    batch_stats,
    need_residual,
    group,
    res_weight=None,
    res_bias=None,
    res_mean=None,
    res_var=None,
    res_eps=0.0,
    values=None,
    grad_values=None,
):
    # The second pass recomputes where that costs no more than reading the gradient at the current back.
    written = need_residual or residual is not None or membrane is not None or num_steps > CHUNK or grad_spikes is None
    gx, ga, gw, gb, grw, grb = _gradients(
        x=x,
        weight=weight,
        bias=bias,
        res_weight=res_weight,
        written=written,
    )
    if x.numel():
        gs, gy, shortcut, kept = (
            None if tensor is None else as_layout(tensor, gx)
            for tensor in (grad_spikes, grad_membrane, residual, membrane)
        )
        neuron = (threshold, decay, surrogate, width, detach_reset, soft_reset)
        run = backward_triton if resolve_backend(x.device, x.dtype) == "triton" else eager.backward
        run(
            gs,
            gy,
            dense(x),
            shortcut,
            kept,
            (weight, bias, mean, var),
            (res_weight, res_bias, res_mean, res_var),
            total,
            eps,
            res_eps,
            num_steps,
            neuron,
            batch_stats,
            ga,
            gx,
            gw,
            gb,
            grw,
            grb,
            group,
            values,
            grad_values,
        )
    else:
        for gradient in (gw, gb, grw, grb):
            gradient.zero_()
    return gx, ga if need_residual else ga.new_empty(0), gw, gb, grw, grb


@register_fake("gac_kernels::norm_lif", lib=_lib)
def _norm_lif_fake(
    x,
    residual,
    weight,
    bias,
    mean,
    var,
    total,
    eps,
    num_steps,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
    batch_stats,
    keep_membrane,
    group,
    res_weight=None,
    res_bias=None,
    res_mean=None,
    res_var=None,
    res_eps=0.0,
    pack=False,
    values=None,
):
    return _outputs(x, num_steps, keep_membrane, pack)


@register_fake("gac_kernels::norm_lif_backward", lib=_lib)
def _norm_lif_backward_fake(
    grad_spikes,
    grad_membrane,
    x,
    residual,
    membrane,
    weight,
    bias,
    mean,
    var,
    total,
    eps,
    num_steps,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
    batch_stats,
    need_residual,
    group,
    res_weight=None,
    res_bias=None,
    res_mean=None,
    res_var=None,
    res_eps=0.0,
):
    return _gradients(
        x=x,
        weight=weight,
        bias=bias,
        res_weight=res_weight,
        written=need_residual,
    )


@register_fake("gac_kernels::norm_lif_backward_learned", lib=_lib)
def _norm_lif_backward_learned_fake(*args: Any):
    *rest, values = args
    return *_norm_lif_backward_fake(*rest), torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    _, membrane, bits = outputs
    x, residual, weight, bias, mean, var, total, *rest, values = inputs
    *ctx.args, ctx.batch_stats, ctx.keep_membrane, ctx.group = rest[:-6]
    *res_norm, ctx.res_eps, _ = rest[-6:]
    ctx.has_residual, ctx.normed = residual is not None, res_norm[2] is not None
    ctx.has_weight, ctx.has_bias = weight is not None, bias is not None
    ctx.set_materialize_grads(False)
    # The stored current stands for the residual too: where it is kept, the residual serves its own norm only.
    residual = None if ctx.keep_membrane and not ctx.normed else residual
    kept = membrane if ctx.keep_membrane else None
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(x, residual, kept, weight, bias, mean, var, total, *res_norm, values)


def _backward(ctx: Any, grad_spikes: Tensor | None, grad_membrane: Tensor | None, _: None) -> Gradients:
    if not ctx.keep_membrane:
        grad_membrane = None
    if grad_spikes is None and grad_membrane is None:
        return (None,) * 25
    x, residual, membrane, weight, bias, mean, var, total, *res_norm, values = ctx.saved_tensors
    learned: Any = () if values is None else (values,)
    run = torch.ops.gac_kernels.norm_lif_backward_learned if learned else torch.ops.gac_kernels.norm_lif_backward
    gx, ga, gw, gb, grw, grb, *of_values = run(
        grad_spikes,
        grad_membrane,
        x,
        residual,
        membrane,
        weight,
        bias,
        mean,
        var,
        total,
        *ctx.args,
        ctx.batch_stats,
        ctx.has_residual,
        ctx.group,
        *res_norm,
        ctx.res_eps,
        *learned,
    )
    of_norm = (gw if ctx.has_weight else None, gb if ctx.has_bias else None)
    of_residual_norm = (grw, grb) if ctx.has_weight and ctx.normed else (None, None)
    at_current = ga if ctx.has_residual else None
    return gx, at_current, *of_norm, *[None] * 14, *of_residual_norm, *[None] * 4, *(of_values or [None])


register_derivatives(
    _lib,
    "norm_lif",
    setup_context=_setup_context,
    backward=_backward,
    again=backward_again,
    definition=definition,
    defaults=(None, None, None, None, 0.0, False, None),
)
