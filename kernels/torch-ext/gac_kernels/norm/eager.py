"""`norm_lif` in vectorised PyTorch, written into given outputs: what runs without Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..neuron.eager import lif_backward, lif_forward
from ..reference import of_channels, state_dtype
from ..spikes.bits import pack_eager

Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # weight, bias, mean, var; no mean: no norm
Neuron = tuple[float, float, int, float, bool, bool]


def resolve_group(name: Any) -> dist.ProcessGroup:
    """The process group of that name, as ``ProcessGroup.group_name`` gives it."""
    return dist.distributed_c10d._resolve_process_group(name)  # the registry that functional collectives use too


def _normed(x: Tensor, norm: Norm, eps: float, out: Tensor | None = None) -> Tensor:
    """Batch norm of x with given statistics, or x + bias without them, in the state's dtype, in ``out`` or new."""
    dtype = state_dtype(x.dtype)
    weight, bias, mean, var = (None if v is None else v.to(dtype).contiguous() for v in norm)
    out = torch.empty_like(x, dtype=dtype) if out is None else out
    if mean is None:
        return out.copy_(x) if bias is None else torch.add(x, bias[:, None, None], out=out)
    if x.device.type == "cpu":
        nothing = x.new_empty(0, dtype=dtype)
        torch.native_batch_norm(x.to(dtype), weight, bias, mean, var, False, 0.0, eps, out=(out, nothing, nothing))
        return out
    return out.copy_(F.batch_norm(x.to(dtype), mean, var, weight, bias, False, 0.0, eps))


def _current(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    res_norm: Norm,
    eps: float,
    res_eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Input current of the neuron in the state's dtype, (T*B, C, H, W), in ``out`` or new."""
    current = _normed(x, norm, eps, out)
    if residual is None:
        return current
    if res_norm[2] is not None:
        residual = _normed(residual, res_norm, res_eps)
    return current.add_(residual)


def _steps(tensor: Tensor, num_steps: int) -> Tensor:
    return tensor.unflatten(0, (num_steps, -1))


def _learned(neuron: Neuron, values: Tensor | None, x: Tensor) -> tuple[Any, Any, int, float, bool, bool]:
    """The neuron with decays and thresholds (2, C), where they are given, as they meet a frame (B, C, H, W)."""
    if values is None:
        return neuron
    decay, threshold = (of_channels(value, x) for value in values)
    return threshold, decay, *neuron[2:]


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    res_norm: Norm,
    eps: float,
    res_eps: float,
    num_steps: int,
    neuron: Neuron,
    batch_stats: bool,
    spikes: Tensor,
    membrane: Tensor,
    bits: Tensor,
    values: Tensor | None = None,
) -> None:
    """Write spikes and, where they have elements, the neuron's input current and the spikes' bits."""
    threshold, decay, surrogate, width, _, soft_reset = _learned(neuron, values, x)
    # Fresh memory costs a CPU as much as the computation: where a tensor is free, the current goes there.
    free = membrane if membrane.numel() else spikes
    out = free if free.dtype == state_dtype(x.dtype) else None
    current = _current(x, residual, norm, res_norm, eps, res_eps, out)
    if membrane.numel():
        if current is not membrane:
            membrane.copy_(current)
        current = membrane  # the neuron sees what is stored
    nothing = x.new_empty(0)
    lif_forward(
        x=_steps(current, num_steps),
        state=None,
        spikes=_steps(spikes, num_steps),
        last=nothing,
        mask=nothing,
        threshold=threshold,
        decay=decay,
        width=width,
        soft_reset=soft_reset,
        surrogate=surrogate,
    )
    if bits.numel():
        pack_eager(spikes, bits, num_steps)


def backward(
    gs: Tensor | None,
    gy: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    membrane: Tensor | None,
    norm: Norm,
    res_norm: Norm,
    total: Tensor | None,
    eps: float,
    res_eps: float,
    num_steps: int,
    neuron: Neuron,
    batch_stats: bool,
    ga: Tensor,
    gx: Tensor,
    gw: Tensor,
    gb: Tensor,
    grw: Tensor,
    grb: Tensor,
    group: str,
    values: Tensor | None = None,
    grad_values: Tensor | None = None,
) -> None:
    """Write the gradients at x and, where they have elements, at the residual, the weights and the biases.

    With ``values`` (2, C) that at decays and thresholds too.
    """
    threshold, decay, surrogate, width, detach_reset, soft_reset = _learned(neuron, values, x)
    dtype = state_dtype(x.dtype)
    out = ga if ga.numel() and ga.dtype == dtype else torch.empty_like(gx, dtype=dtype)
    current = _current(x, residual, norm, res_norm, eps, res_eps, out) if membrane is None else membrane.to(dtype)
    at_spikes = torch.zeros_like(current) if gs is None else gs.to(dtype)
    at_current, nothing = out, x.new_empty(0)  # the gradient takes the place of the current
    lif_backward(
        grad=_steps(at_spikes, num_steps),
        grad_last=None,
        x=_steps(current, num_steps),
        state=None,
        mask=nothing,
        grad_x=_steps(at_current, num_steps),
        grad_state=nothing,
        threshold=threshold,
        decay=decay,
        surrogate=surrogate,
        width=width,
        detach_reset=detach_reset,
        soft_reset=soft_reset,
        grad_values=grad_values,
    )
    if gy is not None:
        at_current.add_(gy)
    gx.copy_(
        _at_input(
            grad=at_current,
            x=x,
            norm=norm,
            eps=eps,
            total=total,
            batch_stats=batch_stats,
            gw=gw,
            gb=gb,
            group=group,
        )
    )
    if residual is not None and res_norm[2] is not None:
        at_current = _at_input(
            grad=at_current,
            x=residual,
            norm=res_norm,
            eps=res_eps,
            total=total,
            batch_stats=batch_stats,
            gw=grw,
            gb=grb,
            group="",
        )
    if ga.numel() and ga is not at_current:
        ga.copy_(at_current)


def _at_input(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    eps: float,
    total: Tensor | None,
    batch_stats: bool,
    gw: Tensor,
    gb: Tensor,
    group: str,
) -> Tensor:
    """Gradient at a norm's input x from that at its output; those at its scale and shift are written."""
    weight, bias, mean, var = norm
    dtype = grad.dtype
    if mean is None or var is None:
        if bias is not None:
            gb.copy_(grad.sum((0, 2, 3)))
        return grad
    if grad.device.type == "cpu" and total is None and not group:
        of_norm = [None if v is None else v.to(dtype).contiguous() for v in (weight, mean, var)]  # read as if packed
        scaled = weight is not None
        at_x, at_weight, at_bias = torch.ops.aten.native_batch_norm_backward(
            grad,
            x.to(dtype),
            *of_norm,
            of_norm[1],
            torch.rsqrt(var.to(dtype) + eps).contiguous(),
            batch_stats,
            eps,
            [True, scaled, scaled],
        )
        if scaled:
            gw.copy_(at_weight)
            gb.copy_(at_bias)
        return at_x
    rstd = torch.rsqrt(var.to(dtype) + eps)
    centred = x.to(dtype) - mean.to(dtype)[:, None, None]
    sums = torch.stack((grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3))))
    scale = rstd if weight is None else rstd * weight.to(dtype)
    if weight is not None:
        gw.copy_(sums[1] * rstd)
        gb.copy_(sums[0])
    if batch_stats:
        if group:
            dist.all_reduce(sums, group=resolve_group(group))
        a, b = sums / (x.numel() // x.shape[1] if total is None else total.to(dtype))
        grad = grad - a[:, None, None] - centred * (rstd.square() * b)[:, None, None]
    return grad * scale[:, None, None]
