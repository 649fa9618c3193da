"""Batch norm, optional residual and multi-step LIF in one pass: x (T*B, C, H, W) to spikes (T*B, C, H, W).

The statistics are inputs (from `batch_stats`, or the running ones). With ``batch_stats=True`` the gradient at x has the
part that flows through them, so they need no gradient of their own. The residual may have a norm of its own (the
shortcut's), and the spikes can be written as bits too, which is all that a convolution has to keep of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    check_finite,
    check_flags,
    check_norm,
    check_residual_norm,
    check_spec,
    check_tensor,
    check_tensors,
)
from ..common.messages import shown
from ..neuron.values import stack_values
from ..spec import CIFAR, LIFSpec, ResidualNorm
from . import norm_lif_op as norm_lif_op  # registers the operators


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
            statistic requires a gradient; T does not divide the first axis; or the spec's neuron has no learned decay
            and threshold, or spikes that no bit holds.
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
