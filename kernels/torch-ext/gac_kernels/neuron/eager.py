"""The ops in vectorised PyTorch, written into given outputs: what runs without Triton.

Unlike the reference these keep no graph: forward overwrites one membrane buffer, backward is the written-out
backpropagation through time. Formulas and their source stand in `LIFSpec` and `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivatives import spec_of
from ..reference import state_dtype, surrogate_derivative
from ..registry import names_of, neuron_by
from ..spec import LIFSpec
from . import blocks, stepwise

# Neurons whose membranes and spikes stay in a core's cache from step to step.
_CACHED = 2**17


def in_memory_order(state: Tensor) -> Tensor:
    """The elements of a dense tensor as a vector, in the order in which they lie in memory."""
    return state.as_strided((state.numel(),), (1,), state.storage_offset())


def shifted(x: Tensor, shift: float) -> Tensor:
    """The sum in float32, which rounds x to a grid (`grid_shift`); x itself where ``shift`` is 0."""
    return x.float().add(shift) if shift else x


def fire(u: Tensor, threshold: float | Tensor) -> Tensor:
    """The spikes of a step, 0 or 1 in the membrane's dtype: a CPU makes bools of them four times as slowly."""
    return torch.gt(u, threshold, out=torch.empty_like(u))


def reset(u: Tensor, fired: Tensor, threshold: float | Tensor, soft_reset: bool, scratch: Tensor) -> Tensor:
    """The membrane after the reset, in the memory of the one before it; ``scratch``, maybe ``fired``, is used up."""
    if soft_reset:
        if isinstance(threshold, Tensor):
            return u.sub_(torch.mul(fired, threshold, out=scratch))
        return u.sub_(fired, alpha=threshold)
    # u where -fired > -0.5, else 0: ten times as fast on a CPU as filling by a mask, and exact for infinities too.
    return torch.ops.aten.threshold_backward.grad_input(u, torch.neg(fired, out=scratch), -0.5, grad_input=u)


def lif_forward(
    x: Tensor,
    state: Tensor | None,
    spikes: Tensor,
    last: Tensor,
    mask: Tensor,
    threshold: float | Tensor,
    decay: float | Tensor,
    width: float,
    soft_reset: bool,
    surrogate: int = 0,
) -> None:
    """Write spikes and, where they have elements, the last membrane and the bit mask; ``spikes`` may be x itself.

    Decay and threshold may be tensors that broadcast over a frame; with them there is no mask. The number of the
    surrogate tells the neuron, too.
    """
    neuron = neuron_by(surrogate)
    if neuron is not None:
        assert not isinstance(threshold, Tensor) and not isinstance(decay, Tensor)
        spec = spec_of(threshold, decay, surrogate, width, False, soft_reset)
        stepwise.forward(x, state, spikes, last, spec, neuron.states)
        return
    if not isinstance(threshold, Tensor) and not isinstance(decay, Tensor):
        blocks.lif_forward(x, state, spikes, last, mask, threshold, decay, width, soft_reset)
        return
    rows = x.shape[1] if x.dim() > 1 else 1
    block = rows
    if x.device.type == "cpu" and x.dim() > 1:
        block = max(1, _CACHED // x[0, 0].numel())
    for first in range(0, rows, block):
        part = (slice(None), slice(first, first + block)) if block < rows else (slice(None),)
        _lif_forward(
            x=x[part],
            state=None if state is None else state[part[1:]],
            spikes=spikes[part],
            last=last[part[1:]] if last.numel() else last,
            threshold=threshold,
            decay=decay,
            soft_reset=soft_reset,
        )


def _lif_forward(
    x: Tensor,
    state: Tensor | None,
    spikes: Tensor,
    last: Tensor,
    threshold: float | Tensor,
    decay: float | Tensor,
    soft_reset: bool,
) -> None:
    v = torch.empty_like(x[0], dtype=state_dtype(x.dtype)).copy_(x[0] if state is None else state)
    scratch = torch.empty_like(v)
    for t, current in enumerate(x):
        u = v if t == 0 and state is None else v.mul_(decay).add_(current)
        # A CPU makes bools of them four times as slowly.
        fired = torch.gt(u, threshold, out=spikes[t] if spikes.dtype == u.dtype else scratch)
        if fired is scratch:
            spikes[t] = fired
        if t + 1 < len(x) or last.numel():
            v = reset(u, fired, threshold, soft_reset, scratch)
    if last.numel():
        last.copy_(v)


def lif_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    mask: Tensor,
    grad_x: Tensor,
    grad_state: Tensor,
    threshold: float | Tensor,
    decay: float | Tensor,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    grad_values: Tensor | None = None,
) -> None:
    """Write the gradients at x and, where it has elements, at the initial state; ``grad_x`` may be x itself.

    Where decay and threshold are tensors that broadcast over a frame, their gradients go into ``grad_values`` (2, N);
    there is no mask then.
    """
    neuron = neuron_by(surrogate)
    if neuron is not None:
        assert not isinstance(threshold, Tensor) and not isinstance(decay, Tensor)
        spec = spec_of(threshold, decay, surrogate, width, detach_reset, soft_reset)
        stepwise.backward(grad, grad_last, x, state, grad_x, grad_state, spec, neuron.states)
        return
    if not isinstance(threshold, Tensor) and not isinstance(decay, Tensor):
        blocks.lif_backward(
            grad=grad,
            grad_last=grad_last,
            x=x,
            state=state,
            mask=mask,
            grad_x=grad_x,
            grad_state=grad_state,
            threshold=threshold,
            decay=decay,
            surrogate=surrogate,
            width=width,
            detach_reset=detach_reset,
            soft_reset=soft_reset,
        )
        return
    dtype = state_dtype(grad.dtype)
    num_steps = grad.shape[0]
    steps = []  # (surrogate derivative, fired, u) of each step
    v = torch.zeros_like(x[0], dtype=dtype) if state is None else state
    for current in x:
        u = decay * v + current
        fired = u > threshold
        steps.append((surrogate_derivative(u - threshold, names_of(surrogate)[1], width), fired, u))
        v = u - threshold * fired.to(u.dtype) if soft_reset else u.masked_fill(fired, 0.0)
    gv = torch.zeros_like(grad[0], dtype=dtype) if grad_last is None else grad_last
    at_values = None if grad_values is None else [torch.zeros_like(gv) for _ in grad_values]
    for t in reversed(range(num_steps)):
        slope, fired, u = steps[t]
        if soft_reset:
            carried = gv if detach_reset else gv * (1.0 - threshold * slope)
        else:
            carried = gv.masked_fill(fired, 0.0)
            if not detach_reset:
                carried = carried - gv * slope * u
        gu = grad[t] * slope + carried
        grad_x[t] = gu
        if at_values is not None:
            at_values[1] += at_threshold(
                grad[t], gv, u, fired, slope, threshold, detach_reset=detach_reset, soft_reset=soft_reset
            )
            if t:
                _, fired, u = steps[t - 1]
                at_values[0] += gu * (u - threshold * fired.to(u.dtype) if soft_reset else u.masked_fill(fired, 0.0))
            elif state is not None:
                at_values[0] += gu * state
        gv = decay * gu
    if grad_state.numel():
        grad_state.copy_(gv)
    if at_values is not None and grad_values is not None:
        sum_over_frame(at_values, grad_values)


def at_threshold(
    gs: Tensor,
    gv: Tensor,
    u: Tensor,
    fired: Tensor,
    slope: Tensor,
    threshold: float | Tensor,
    detach_reset: bool,
    soft_reset: bool,
) -> Tensor:
    """Gradient at the threshold of one step, one element a neuron: see `common.neuron_step.threshold_grad`."""
    through = gs if detach_reset else gs - gv * (threshold if soft_reset else u)
    grad = -(through * slope)
    return grad.sub_(gv.masked_fill(~fired, 0.0)) if soft_reset else grad


def sum_over_frame(at_values: list[Tensor], grad_values: Tensor) -> None:
    """Sum gradients (B, C, ...) of each value into (values, N), N being 1 or C."""
    for row, parts in zip(grad_values, at_values, strict=True):
        row.copy_(parts.sum().view(1) if len(row) == 1 else parts.transpose(0, 1).flatten(1).sum(1))


def masked_gradients(grad: Tensor, grad_last: Tensor | None, bits: Tensor, spec: LIFSpec) -> tuple[Tensor, Tensor]:
    """`lif_backward` by the bit mask as operations that can be differentiated in turn.

    Args:
        grad: (T, ...), at the spikes.
        grad_last: (...), at the last membrane.
        bits: (...) int64, two bits a step: fired, and inside the rectangle.
        spec: With a rectangle as surrogate.

    Returns:
        Gradients at the input current and at the first membrane. Both are linear in those given; at the membrane the
        rectangle has no slope.
    """
    dtype = state_dtype(grad.dtype)
    gv = torch.zeros_like(grad[0], dtype=dtype) if grad_last is None else grad_last
    at_current = []
    for t in reversed(range(grad.shape[0])):
        code = bits >> (2 * t)
        slope = (code & 2).to(dtype) / (4.0 * spec.width)
        if spec.soft_reset:
            kept = 1.0 if spec.detach_reset else 1.0 - spec.threshold * slope
        else:
            kept = 1.0 - (code & 1).to(dtype)
        gu = grad[t].to(dtype) * slope + gv * kept
        at_current.append(gu.to(grad.dtype))
        gv = spec.decay * gu
    return torch.stack(at_current[::-1]), gv
