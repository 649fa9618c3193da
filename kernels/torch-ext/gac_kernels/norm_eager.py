"""`norm_lif` in vectorised PyTorch, written into outputs that the caller made: what runs without Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import eager
from .reference import state_dtype

Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor]
Neuron = tuple[float, float, int, float, bool, bool]


def resolve_group(name: Any) -> dist.ProcessGroup:
    """The process group of that name, as ``ProcessGroup.group_name`` gives it."""
    return dist.distributed_c10d._resolve_process_group(name)  # the registry that functional collectives use too


def _current(x: Tensor, residual: Tensor | None, norm: Norm, eps: float) -> Tensor:
    """Input current of the neuron in the state's dtype, (T*B, C, H, W)."""
    weight, bias, mean, var = norm
    dtype = state_dtype(x.dtype)
    scale, shift = (None if v is None else v.to(dtype) for v in (weight, bias))
    current = F.batch_norm(x.to(dtype), mean.to(dtype), var.to(dtype), scale, shift, False, 0.0, eps)
    return current if residual is None else current.add_(residual)


def _steps(tensor: Tensor, num_steps: int) -> Tensor:
    return tensor.unflatten(0, (num_steps, -1))


def forward(
    x: Tensor, residual: Tensor | None, norm: Norm, eps: float, num_steps: int, neuron: Neuron, spikes: Tensor,
    membrane: Tensor,
) -> None:  # fmt: skip
    """Write spikes and, where it has elements, the neuron's input current."""
    threshold, decay, _, width, _, soft_reset = neuron
    current = _current(x, residual, norm, eps)
    if membrane.numel():
        membrane.copy_(current)
        current = membrane  # the neuron sees what is stored
    nothing = x.new_empty(0)
    eager.lif_forward(
        _steps(current, num_steps), None, _steps(spikes, num_steps), nothing, nothing, threshold, decay, width,
        soft_reset,
    )  # fmt: skip


def backward(
    gs: Tensor | None, gy: Tensor | None, x: Tensor, residual: Tensor | None, membrane: Tensor | None, norm: Norm,
    total: Tensor | None, eps: float, num_steps: int, neuron: Neuron, batch_stats: bool, ga: Tensor, gx: Tensor,
    gw: Tensor, gb: Tensor, group: str,
) -> None:  # fmt: skip
    """Write the gradients at x and, where they have elements, at the current, the weight and the bias."""
    threshold, decay, surrogate, width, detach_reset, soft_reset = neuron
    weight, _, mean, var = norm
    dtype = state_dtype(x.dtype)
    current = _current(x, residual, norm, eps) if membrane is None else membrane.to(dtype)
    at_spikes = torch.zeros_like(current) if gs is None else gs.to(dtype)
    at_current, nothing = torch.empty_like(current), x.new_empty(0)
    eager.lif_backward(
        _steps(at_spikes, num_steps), None, _steps(current, num_steps), None, nothing, _steps(at_current, num_steps),
        nothing, threshold, decay, surrogate, width, detach_reset, soft_reset,
    )  # fmt: skip
    if gy is not None:
        at_current.add_(gy)
    mean, rstd = mean.to(dtype), torch.rsqrt(var.to(dtype) + eps)
    centred = x.to(dtype) - mean[:, None, None]
    sums = torch.stack((at_current.sum((0, 2, 3)), (at_current * centred).sum((0, 2, 3))))
    scale = rstd if weight is None else rstd * weight.to(dtype)
    if weight is not None:
        gw.copy_(sums[1] * rstd)
        gb.copy_(sums[0])
    if ga.numel():
        ga.copy_(at_current)
    grad = at_current
    if batch_stats:
        if group:
            dist.all_reduce(sums, group=resolve_group(group))
        a, b = sums / (x.numel() // x.shape[1] if total is None else total.to(dtype))
        grad = grad - a[:, None, None] - centred * (rstd.square() * b)[:, None, None]
    gx.copy_(grad * scale[:, None, None])
