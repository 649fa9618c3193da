"""`gated_lif` in vectorised PyTorch, written into given outputs: what runs without Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import spec_of
from ..neuron import stepwise
from ..neuron.eager import at_threshold, fire, reset, sum_over_frame
from ..reference import of_channels, state_dtype, surrogate_derivative
from ..registry import names_of, neuron_by, states_by
from ..spec import LIFSpec


def gated_lif_forward(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    y: Tensor,
    threshold: float | Tensor,
    decay: float | Tensor,
    soft_reset: bool,
    values: Tensor | None = None,
    surrogate: int = 0,
) -> None:
    """Write the gated spikes of a static (4-D) or varying (5-D) current."""
    dtype = state_dtype(x.dtype)
    if neuron_by(surrogate) is not None:
        spec = _spec(threshold, decay, surrogate, 1.0, False, soft_reset)
        for t, s in enumerate(_spikes(x, len(y), spec)):
            y[t] = _gate(spatial if x.dim() == 4 else spatial[t], temporal[:, t], dtype).mul_(s)
        return
    if values is not None:
        decay, threshold = (of_channels(value, y[0]) for value in values)
    v = torch.zeros_like(y[0], dtype=dtype)
    for t in range(y.shape[0]):
        current, scores = (x, spatial) if x.dim() == 4 else (x[t], spatial[t])
        u = v.mul_(decay).add_(current)
        fired = fire(u, threshold)
        y[t] = _gate(scores, temporal[:, t], dtype).mul_(fired)
        v = reset(u, fired, threshold, soft_reset, fired)


def _gate(scores: Tensor, temporal: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate of a step from its scores (B, C, H, W) and (B,)."""
    return torch.sigmoid(temporal[:, None, None, None].to(dtype) * scores.to(dtype))


def _spec(threshold: float | Tensor, decay: float | Tensor, *rest: Any) -> LIFSpec:
    """The spec of a registered neuron, whose threshold and decay are numbers."""
    assert not isinstance(threshold, Tensor) and not isinstance(decay, Tensor)
    return spec_of(threshold, decay, *rest)


def _currents(x: Tensor, num_steps: int) -> Tensor:
    """A static (4-D) or varying (5-D) current as one of each step, contiguous, in the membrane's dtype."""
    frames = x.expand(num_steps, *x.shape) if x.dim() == 4 else x
    return frames.to(state_dtype(x.dtype), memory_format=torch.contiguous_format).contiguous()


def _spikes(x: Tensor, num_steps: int, spec: LIFSpec) -> Tensor:
    """Spikes (T, B, C, H, W) of a registered neuron, in the membrane's dtype."""
    current = _currents(x, num_steps)
    spikes = torch.empty_like(current)
    stepwise.forward(current, None, spikes, current.new_empty(0), spec, states_by(spec.surrogate_id))
    return spikes


def _registered_backward(
    grad: Tensor,
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    grad_x: Tensor,
    grad_spatial: Tensor,
    grad_temporal: Tensor,
    spec: LIFSpec,
) -> None:
    """`gated_lif_backward` of a registered neuron."""
    dtype, static, num_steps = state_dtype(x.dtype), x.dim() == 4, len(grad)
    spikes = _spikes(x, num_steps, spec)
    through, sum_n = torch.empty_like(spikes), torch.zeros_like(spikes[0])
    for t in range(num_steps):
        scores = (spatial if static else spatial[t]).to(dtype)
        gate = _gate(scores, temporal[:, t], dtype)
        torch.mul(grad[t].to(dtype), gate, out=through[t])
        gz = through[t] * (1.0 - gate) * spikes[t]
        grad_temporal[:, t] = (gz * scores).sum((1, 2, 3))
        gz.mul_(temporal[:, t, None, None, None].to(dtype))
        if static:
            sum_n += gz
        else:
            grad_spatial[t] = gz
    nothing = through.new_empty(0)
    current = _currents(x, num_steps)
    stepwise.backward(through, None, current, None, through, nothing, spec, states_by(spec.surrogate_id))
    grad_x.copy_(through.sum(0) if static else through)
    if static:
        grad_spatial.copy_(sum_n)


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
    if neuron_by(surrogate) is not None:
        spec = _spec(threshold, decay, surrogate, width, detach_reset, soft_reset)
        _registered_backward(grad, x, spatial, temporal, grad_x, grad_spatial, grad_temporal, spec)
        return
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
        slope = surrogate_derivative(u - threshold, names_of(surrogate)[1], width)
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
