"""Batch statistics, and batch norm, residual and neuron one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import CIFAR, LIFSpec, ResidualNorm
from .neuron import fire, state_dtype
from .spikes import pack_spikes_reference


def batch_stats_reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    num_batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, without gradient.

    Args:
        x: (N, C, H, W).
        running_mean: (C,), updated in place where given: ``(1 - momentum) * running_mean + momentum * mean``.
        running_var: (C,), likewise, with the unbiased variance.
        momentum: Weight of this batch in the running statistics.
        num_batches: One integer, counted up by 1 where given.

    Returns:
        Mean (C,) and variance (C,), float32 (float64 for float64).
    """
    wide = x.detach().to(state_dtype(x.dtype))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    if running_mean is not None and running_var is not None:
        unbiased = torch.var(wide, (0, 2, 3), correction=1)
        running_mean.copy_((1.0 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1.0 - momentum) * running_var + momentum * unbiased)
    if num_batches is not None:
        num_batches += 1
    return mean, var


def _norm(x: Tensor, norm: ResidualNorm, batch_stats: bool) -> Tensor:
    """Batch norm of x (N, C, H, W), without statistics its scale and shift alone.

    With ``batch_stats`` the statistics are those of x, and gradients flow through them.
    """
    mean, var = norm.mean, norm.var
    if batch_stats:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if mean is not None and var is not None:
        x = (x - mean[:, None, None]) * torch.rsqrt(var + norm.eps)[:, None, None]
    if norm.weight is not None:
        x = x * norm.weight[:, None, None]
    if norm.bias is not None:
        x = x + norm.bias[:, None, None]
    return x


def norm_lif_reference(
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
    smooth: bool = False,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Batch norm, residual and multi-step LIF, one after the other.

    Args:
        x: (T*B, C, H, W), row ``t * B + b`` being sample b at step t.
        mean: (C,), or None for a bias alone. With ``batch_stats`` mean and variance are computed from x here, so that
            autograd sees them.
        var: (C,), biased; likewise.
        num_steps: T.
        spec: Dynamics and surrogate.
        weight: (C,) scale, with ``bias``; 1 if None.
        bias: (C,) shift; 0 if None.
        residual: (T*B, C, H, W), added to the norm's output.
        eps: Added to the variance.
        batch_stats: Use the statistics of x itself, and of the residual for its norm.
        return_membrane: Return the neuron's input current as well.
        residual_norm: Batch norm of the residual before it is added.
        return_bits: Return the spikes as bits as well, see `pack_spikes_reference`.
        smooth: Differentiable twin for numerical gradient checks.
        decay: In the place of the spec's: one element or (C,).
        threshold: Likewise.

    Returns:
        Spikes (T*B, C, H, W) in x's dtype; with ``return_membrane`` the current before them, with ``return_bits`` the
        bits behind them, in a tuple. A current that is returned is rounded to x's dtype before the neuron sees it.
    """
    a = _norm(
        x.to(state_dtype(x.dtype)),
        ResidualNorm(
            mean=mean,
            var=var,
            weight=weight,
            bias=bias,
            eps=eps,
        ),
        batch_stats,
    )
    if residual is not None and residual_norm is not None:
        a = a + _norm(residual.to(a.dtype), residual_norm, batch_stats)
    elif residual is not None:
        a = a + residual
    if return_membrane:
        a = a.to(x.dtype)
    spikes = fire(a, num_steps, spec, smooth, decay, threshold).to(x.dtype)
    if not (return_membrane or return_bits):
        return spikes
    bits = [pack_spikes_reference(spikes, num_steps)] if return_bits else []
    return (*([a] if return_membrane else []), spikes, *bits)
