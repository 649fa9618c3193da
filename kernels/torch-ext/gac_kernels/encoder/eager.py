"""`gated_lif` in vectorised PyTorch, written into given outputs: what runs without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..neuron.eager import at_threshold, fire, reset, sum_over_frame
from ..reference import of_channels, state_dtype, surrogate_derivative
from ..spec import SURROGATES


def gated_lif_forward(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    y: Tensor,
    threshold: float | Tensor,
    decay: float | Tensor,
    soft_reset: bool,
    values: Tensor | None = None,
) -> None:
    """Write the gated spikes of a static (4-D) or varying (5-D) current."""
    dtype = state_dtype(x.dtype)
    if values is not None:
        decay, threshold = (of_channels(value, y[0]) for value in values)
    v = torch.zeros_like(y[0], dtype=dtype)
    for t in range(y.shape[0]):
        current, scores = (x, spatial) if x.dim() == 4 else (x[t], spatial[t])
        u = v.mul_(decay).add_(current)
        fired = fire(u, threshold)
        gate = torch.sigmoid(temporal[:, t, None, None, None].to(dtype) * scores.to(dtype))
        y[t] = gate.mul_(fired)
        v = reset(u, fired, threshold, soft_reset, fired)


def gated_lif_backward(
    grad: Tensor,
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    grad_x: Tensor,
    grad_spatial: Tensor,
    grad_temporal: Tensor,
    threshold: float | Tensor,
    decay: float | Tensor,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    values: Tensor | None = None,
    grad_values: Tensor | None = None,
) -> None:
    """Write the gradients at the current, the spatial and the temporal scores; with values (2, N) those at them too."""
    dtype, static = state_dtype(x.dtype), x.dim() == 4
    if values is not None:
        decay, threshold = (of_channels(value, grad[0]) for value in values)
    membranes, decayed = [], []
    v = torch.zeros_like(grad[0], dtype=dtype)
    for t in range(grad.shape[0]):
        if values is not None:
            decayed.append(v)
        u = decay * v + (x if static else x[t])
        fired = u > threshold
        membranes.append(u)
        v = u - threshold * fired.to(u.dtype) if soft_reset else u.masked_fill(fired, 0.0)
    gv, sum_x, sum_n = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(v)
    at_values = [torch.zeros_like(v) for _ in range(2 if values is not None else 0)]
    for t in reversed(range(grad.shape[0])):
        u, scores = membranes[t], (spatial if static else spatial[t]).to(dtype)
        m, gy, fired = temporal[:, t, None, None, None].to(dtype), grad[t].to(dtype), u > threshold
        gate = torch.sigmoid(m * scores)
        slope = surrogate_derivative(u - threshold, SURROGATES[surrogate], width)
        gz = (gy * gate * (1.0 - gate)).masked_fill(~fired, 0.0)
        kept = torch.ones_like(u) if soft_reset else (~fired).to(dtype)
        through_spike = 0.0 if detach_reset else slope * (threshold if soft_reset else u)
        gu = gy * gate * slope + gv * (kept - through_spike)
        grad_temporal[:, t] = (gz * scores).sum((1, 2, 3))
        if at_values:
            at_values[0] += gu * decayed[t]
            at_values[1] += at_threshold(
                gy * gate, gv, u, fired, slope, threshold, detach_reset=detach_reset, soft_reset=soft_reset
            )
        gv = decay * gu
        if static:
            sum_x += gu
            sum_n += gz * m
        else:
            grad_x[t], grad_spatial[t] = gu, gz * m
    if static:
        grad_x.copy_(sum_x)
        grad_spatial.copy_(sum_n)
    if grad_values is not None:
        sum_over_frame(at_values, grad_values)
