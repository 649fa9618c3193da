"""The neuron step by step, its surrogate derivatives, and a smooth twin for numerical gradient checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import State, Step, neuron_of, own_surrogate
from ..spec import CIFAR, LIFSpec


def surrogate_derivative(d: Tensor, surrogate: str, width: float) -> Tensor:
    """Surrogate of ds/du at d = u - threshold; formulas in `LIFSpec`."""
    if surrogate == "triangle":
        return (width - d.abs()).clamp(min=0.0) / width**2
    if surrogate == "rectangle":
        return (d.abs() < width).to(d.dtype) / (2.0 * width)
    if surrogate == "atan":
        return 1.0 / (width * (1.0 + (d * (math.pi / width)).square()))
    if surrogate != "sigmoid":
        return own_surrogate(surrogate).derivative(d, width)
    p = torch.sigmoid(d * (4.0 / width))
    return (4.0 / width) * p * (1.0 - p)


def smooth_step(d: Tensor, surrogate: str, width: float) -> Tensor:
    """Integral of `surrogate_derivative`: rises from 0 to 1 around d = 0."""
    if surrogate == "triangle":
        z = (d / width).clamp(-1.0, 1.0)
        return 0.5 + z - 0.5 * z * z.abs()
    if surrogate == "rectangle":
        return 0.5 + d.clamp(-width, width) / (2.0 * width)
    if surrogate == "atan":
        return 0.5 + torch.atan(d * (math.pi / width)) / math.pi
    if surrogate != "sigmoid":
        integral = own_surrogate(surrogate).integral
        if integral is None:
            raise ValueError(
                f"expected a surrogate with an integral for the smooth twin, got {surrogate!r}: register it with one"
            )
        return integral(d, width)
    return torch.sigmoid(d * (4.0 / width))


class _Step(torch.autograd.Function):
    """Heaviside step, strict, with a surrogate derivative of any order, also under `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, surrogate: str, width: float) -> Tensor:
        return (d > 0).to(d.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, str, float], output: Tensor) -> None:
        d, ctx.surrogate, ctx.width = inputs
        ctx.save_for_backward(d)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (d,) = ctx.saved_tensors
        return grad * surrogate_derivative(d, ctx.surrogate, ctx.width), None, None


class _StepBothModes(_Step):
    """`_Step` with forward mode, for which `torch.compile` refuses a function."""

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, str, float], output: Tensor) -> None:
        _Step.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:
        (d,) = ctx.saved_tensors
        return tangent * surrogate_derivative(d, ctx.surrogate, ctx.width)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the membrane for an input of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def steps_of(x: Tensor, num_steps: int) -> Tensor:
    """A time-folded (T*B, ...) tensor as (T, B, ...)."""
    return x.unflatten(0, (num_steps, x.shape[0] // num_steps))


def of_channels(value: float | Tensor, frame: Tensor) -> Any:
    """A decay or threshold as it meets a frame (B, C, ...): a number as it is, a tensor of one element or (C,)."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(state_dtype(frame.dtype))
    return value.reshape(()) if value.numel() == 1 else value.view(-1, *[1] * (frame.dim() - 2))


def lif_reference(
    x: Tensor,
    spec: LIFSpec = CIFAR,
    state: Tensor | None = None,
    return_state: bool = False,
    smooth: bool = False,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-step leaky integrate-and-fire neuron, step by step.

    Args:
        x: (T, ...), input current.
        spec: Dynamics and surrogate.
        state: (...), membrane potential after the reset of the step before the first; zeros if None.
        return_state: Return the last membrane potential as well.
        smooth: Differentiable twin for numerical gradient checks.
        decay: In the place of the spec's: one element, or (C,) for x (T, B, C, ...).
        threshold: Likewise.

    Returns:
        Spikes (T, ...) in x's dtype, and with ``return_state`` the membrane (...) in float32 (float64 for float64). Of
        a registered neuron with several states, state and what is returned of it are (states, ...).
    """
    neuron = neuron_of(spec.neuron)
    if neuron is not None:
        if decay is not None or threshold is not None:
            spec.refuse_others("learned decay and threshold")
        start = state if state is None or neuron.states > 1 else state[None]
        fired, after = run_steps(x, start, spec, smooth)
        out = torch.stack(fired).to(x.dtype)
        return (out, torch.stack(after) if neuron.states > 1 else after[0]) if return_state else out
    v = torch.zeros_like(x[0], dtype=state_dtype(x.dtype)) if state is None else state.to(state_dtype(x.dtype))
    kept = of_channels(spec.decay if decay is None else decay, v)
    level = of_channels(spec.threshold if threshold is None else threshold, v)
    step = _Step if torch.compiler.is_compiling() else _StepBothModes
    spikes = []
    for current in x:
        u = kept * v + current.to(v.dtype)
        d = u - level
        s = smooth_step(d, spec.surrogate, spec.width) if smooth else step.apply(d, spec.surrogate, spec.width)
        r = s.detach() if spec.detach_reset else s
        v = u - level * r if spec.soft_reset else (1.0 - r) * u
        spikes.append(s.to(x.dtype))
    return (torch.stack(spikes), v) if return_state else torch.stack(spikes)


def run_steps(
    x: Tensor, state: Tensor | State | None, spec: LIFSpec, smooth: bool = False, gradient: bool = True
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """A registered neuron over (T, ...), step by step.

    Args:
        x: (T, ...), input current.
        state: Its states (...) before the first step; zeros if None.
        spec: With the neuron's name.
        smooth: See `lif_reference`.
        gradient: The spikes need one.

    Returns:
        Spikes of each step and the last states, (...) each in the membrane's dtype.
    """
    neuron, dtype = neuron_of(spec.neuron), state_dtype(x.dtype)
    assert neuron is not None
    step = _Step if torch.compiler.is_compiling() else _StepBothModes

    def spike(d: Tensor) -> Tensor:
        if smooth:
            return smooth_step(d, spec.surrogate, spec.width)
        if not gradient:
            return (d > 0).to(d.dtype)
        return step.apply(d, spec.surrogate, spec.width)

    def held(s: Tensor) -> Tensor:
        return s.detach() if spec.detach_reset else s

    zeros = torch.zeros_like(x[0], dtype=dtype)
    states = (zeros,) * neuron.states if state is None else tuple(each.to(dtype) for each in state)
    given = Step(spec.threshold, spec.decay, spec.soft_reset, neuron.constants, spike, held)
    spikes = []
    for current in x:
        s, states = _stepped(neuron.step(current.to(dtype), states, given), current, neuron.states, spec.neuron)
        spikes.append(s)
    return spikes, states


def _stepped(result: Any, x: Tensor, states: int, name: str) -> tuple[Tensor, State]:
    """What a step returned, checked: a state that is no tuple would be taken apart along its first axis."""
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or not isinstance(result[1], tuple) or len(result[1]) != states:
        wanted = "(v,)" if states == 1 else f"a tuple of {states}"
        got = f"({type(result[0]).__name__}, {_kinds(result[1])})" if pair else _kinds(result)
        raise ValueError(
            f"expected the step of neuron {name!r} to return spikes and a tuple with its states={states}, got {got}: "
            f"return s, {wanted}, and register it with the number of its states"
        )
    for value in (result[0], *result[1]):
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"expected spikes and states of neuron {name!r} as tensors of the input's shape {tuple(x.shape)}, got "
                f"{got}: compute each of them elementwise"
            )
    return result


def _kinds(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"a {type(value).__name__}"
    return f"({', '.join(type(each).__name__ for each in value)}{',' * (len(value) == 1)})"


def fire(
    current: Tensor,
    num_steps: int,
    spec: LIFSpec,
    smooth: bool = False,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Spikes of a time-folded current, both (T*B, ...); arguments as in `lif_reference`."""
    spikes = lif_reference(steps_of(current, num_steps), spec, smooth=smooth, decay=decay, threshold=threshold)
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    return spikes.flatten(0, 1)


def integer_lif_reference(x: Tensor, num_steps: int, spec: LIFSpec = CIFAR) -> Tensor:
    """Multi-step leaky integrate-and-fire neuron of a time-folded sequence, with int8 spikes and no gradient.

    Args:
        x: (T*B, ...), input current, row ``t * B + b`` being sample b at step t.
        num_steps: T.
        spec: Dynamics.

    Returns:
        Spikes (T*B, ...) int8, 0 or 1.
    """
    return fire(x.detach(), num_steps, spec).to(torch.int8)
