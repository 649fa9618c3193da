"""`norm_lif` as PyTorch operations, for what its backward kernels do not have: see `gac_kernels.derivatives`.

The values are those of `eager`, to the bit where the statistics are given, so that the same neurons fire.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import Gradients, differentiable_gradients, spec_of
from ..neuron.values import named_values
from ..reference import lif_reference, pack_spikes_reference, state_dtype
from ..spec import LIFSpec
from .eager import Norm

_SHARED = (
    "expected one derivative of norm_lif where processes share its statistics, got a second one, torch.func or forward "
    "mode: use one process, or eval mode"
)


def _normed(x: Tensor, norm: Norm, eps: float, batch_stats: bool) -> Tensor:
    """Batch norm of x in the state's dtype; with ``batch_stats`` by its own statistics, which have gradients."""
    dtype = state_dtype(x.dtype)
    weight, bias, mean, var = (None if v is None else v.to(dtype) for v in norm)
    x = x.to(dtype)
    if mean is None:
        return x if bias is None else x + bias[:, None, None]
    if batch_stats:
        mean = var = None
    return F.batch_norm(x, mean, var, weight, bias, batch_stats, 0.0, eps)


def _fire(current: Tensor, num_steps: int, spec: LIFSpec, values: Tensor | None) -> Tensor:
    steps = current.unflatten(0, (num_steps, current.shape[0] // num_steps))
    spikes = lif_reference(steps, spec, **named_values(values))
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    return spikes.flatten(0, 1)


def definition(x, residual, weight, bias, mean, var, total, eps, num_steps, *rest: Any):
    """The op, with its arguments and outputs."""
    *spec_args, batch_stats, keep_membrane, group, res_weight, res_bias, res_mean, res_var, res_eps, pack, values = rest
    if group or total is not None:
        raise NotImplementedError(_SHARED)
    spec = spec_of(*spec_args)
    current = _normed(x, (weight, bias, mean, var), eps, batch_stats)
    if residual is not None and res_mean is not None:
        current = current + _normed(residual, (res_weight, res_bias, res_mean, res_var), res_eps, batch_stats)
    elif residual is not None:
        current = current + residual
    if keep_membrane:
        current = current.to(x.dtype)  # the neuron sees what is stored
    spikes = _fire(current, num_steps, spec, values).to(x.dtype)
    bits = pack_spikes_reference(spikes, num_steps) if pack else x.new_empty(0, dtype=torch.uint8)
    return spikes, current if keep_membrane else x.new_empty(0), bits


def backward_again(ctx: Any, grad_spikes: Tensor | None, grad_membrane: Tensor | None, _: None) -> Gradients:
    """Gradients at the op's arguments, which can be differentiated in turn."""
    x, residual, membrane, weight, bias, mean, var, total, *res_norm, values = ctx.saved_tensors
    eps, num_steps, *spec_args = ctx.args
    if ctx.group or total is not None:
        raise NotImplementedError(_SHARED)
    grads: tuple[Tensor | None, ...] = (grad_spikes, grad_membrane if ctx.keep_membrane else None)
    if membrane is not None:  # an output, so what depends on it is differentiated by way of this node once more
        through_spikes, at_values = differentiable_gradients(
            lambda current, values: _fire(current, num_steps, spec_of(*spec_args), values),
            [membrane, values],
            [grad_spikes],
        )
        parts = [grad for grad in (through_spikes, grad_membrane) if grad is not None]
        grads = (sum(parts[1:], parts[0]) if parts else None,)

    def function(x, residual, weight, bias, res_weight, res_bias, values):
        current = _normed(x, (weight, bias, mean, var), eps, ctx.batch_stats)
        if residual is not None and ctx.normed:
            norm = (res_weight, res_bias, *res_norm[2:])
            current = current + _normed(residual, norm, ctx.res_eps, ctx.batch_stats)
        elif residual is not None:
            current = current + residual
        if membrane is not None:
            return current.to(x.dtype)
        return _fire(current, num_steps, spec_of(*spec_args), values).to(x.dtype), current

    inputs = (x, residual, weight, bias, *res_norm[:2], values)
    gx, gr, gw, gb, grw, grb, gv = differentiable_gradients(function, inputs, grads)
    gv = gv if membrane is None else at_values
    if membrane is not None and not ctx.normed and ctx.has_residual and ctx.needs_input_grad[1]:
        gr = grads[0]
    return gx, gr, gw, gb, *[None] * 14, grw, grb, *[None] * 4, gv
