"""Batch norm, optional residual and multi-step LIF in one pass: x (T*B, C, H, W) to spikes (T*B, C, H, W).

The statistics are inputs (from `batch_stats`, or the running ones). With ``batch_stats=True`` the gradient at x has the
part that flows through them, so they need no gradient of their own. The residual may have a norm of its own (the
shortcut's), and the spikes can be written as bits too, which is all that a convolution has to keep of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import (
    check_finite,
    check_flags,
    check_norm,
    check_residual_norm,
    check_spec,
    check_tensor,
    check_tensors,
)
from ..common.fake import register_fake
from ..common.layout import as_layout
from ..common.messages import shown
from ..common.tiles import dense
from ..derivatives import Gradients, register_derivatives
from ..neuron.lif import CHUNK
from ..neuron.values import check_values, stack_values
from ..spec import CIFAR, LIFSpec, ResidualNorm
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


def _check_statistics(*statistics: Tensor | None) -> None:
    for tensor in statistics:
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "expected mean and var without a gradient, got one that requires it: they are constants here (with "
                "batch_stats the gradient at x has their part), give them detached"
            )


def norm_lif(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    num_steps: int,
    spec: LIFSpec = CIFAR,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    batch_stats: bool = False,
    return_membrane: bool = False,
    residual_norm: ResidualNorm | None = None,
    return_bits: bool = False,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
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
        decay: In the place of the spec's, with a gradient: one element or (C,), any floating dtype, between 0 and 1.
        threshold: Likewise, above 0.

    Returns:
        Spikes (T*B, C, H, W), 0 or 1, in x's dtype and memory format; with ``return_membrane`` the current before them,
        with ``return_bits`` the bits behind them, in a tuple. The current is computed in float32 (float64 for float64);
        where it is returned, it is rounded to x's dtype before the neuron sees it.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device or, on a CPU, a decay or threshold is out of range; a
            statistic requires a gradient; or T does not divide the first axis.
    """
    check_spec(spec)
    check_tensor("x", x)
    check_flags(batch_stats=batch_stats, return_membrane=return_membrane, return_bits=return_bits)
    check_finite("eps", eps, 0.0)
    check_tensors(residual=residual, weight=weight, bias=bias, mean=mean, var=var)
    _check_statistics(mean, var)
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
    res_norm = ResidualNorm(None, None) if residual_norm is None else residual_norm
    if not isinstance(res_norm, ResidualNorm):
        raise ValueError(
            f"expected residual_norm as a ResidualNorm, got {shown(res_norm)}: use ResidualNorm(mean, var)"
        )
    check_finite("residual_norm.eps", res_norm.eps, 0.0)
    for name, tensor in zip(res_norm._fields[:4], res_norm, strict=False):
        check_tensors(**{f"residual_norm.{name}": tensor})
    _check_statistics(res_norm.mean, res_norm.var)
    res_args = (res_norm.weight, res_norm.bias, res_norm.mean, res_norm.var)
    check_residual_norm(x, residual, weight, *res_args)
    spikes, membrane, bits = torch.ops.gac_kernels.norm_lif(
        x,
        residual,
        weight,
        bias,
        mean,
        var,
        None,
        eps,
        num_steps,
        *spec.op_arguments,
        batch_stats,
        return_membrane,
        "",
        *res_args,
        res_norm.eps,
        return_bits,
        stack_values(x, x.shape[1], spec, decay, threshold, expand=True),
    )
    if not (return_membrane or return_bits):
        return spikes
    return (*([membrane] if return_membrane else []), spikes, *([bits] if return_bits else []))
