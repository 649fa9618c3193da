"""Surrogates and neurons by name: those of this package and one's own.

Operators take a number for the pair of both (`LIFSpec.surrogate_id`): 0 to 3 for the leaky integrate-and-fire neuron
with the surrogates of ``spec.SURROGATES``, else one that follows from the two names, the same in every process.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .common.messages import shown
from .common.triton import HAS_TRITON

if HAS_TRITON:
    from triton.runtime.jit import KernelInterface

SPIKES = ("binary", "ternary", "levels")
BUILT_IN = ("triangle", "rectangle", "atan", "sigmoid")
LIF = "lif"
State = tuple[Any, ...]


@dataclass(frozen=True)
class Surrogate:
    """A surrogate of ds/du, written once in PyTorch and once in Triton.

    Args:
        name: Under which `LIFSpec.surrogate` names it.
        derivative: ``(d: Tensor, width: float) -> Tensor``, its value at the distance d from the threshold.
        kernel: ``@triton.jit`` function ``(d, WIDTH)`` with the same values, d and result float32.
        integral: ``(d: Tensor, width: float) -> Tensor``, the antiderivative that rises from 0 to 1, for the smooth
            twin of references; without it that twin is refused.
    """

    name: str
    derivative: Callable[[Tensor, float], Tensor]
    kernel: Any
    integral: Callable[[Tensor, float], Tensor] | None = None


class Step(NamedTuple):
    """What a neuron's step in PyTorch is given.

    Attributes:
        threshold: Of the `LIFSpec`.
        decay: Likewise.
        soft_reset: Whether the reset subtracts the threshold rather than clearing the membrane.
        constants: Of the `Neuron`.
        spike: A function of the distance d from the threshold: 1 above 0, with the surrogate as derivative.
        held: A function of the spikes in the reset: themselves, without gradient where the spec detaches the reset.
    """

    threshold: float
    decay: float
    soft_reset: bool
    constants: tuple[float, ...]
    spike: Callable[[Tensor], Tensor]
    held: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Neuron:
    """One step of a neuron, written once in PyTorch and once, with its derivative, in Triton.

    All states are zero before the first step. In kernels everything is float32, and a state is a tuple of blocks.

    Args:
        name: Under which `LIFSpec.neuron` names it.
        step: ``(x, state, n) -> (s, state)`` in PyTorch: from the input current, a tuple of states and a `Step` the
            spikes and the new states. Autograd differentiates it: no in-place operations.
        kernel: ``@triton.jit`` function ``(x, state, THRESHOLD, DECAY, SOFT, CONSTANTS) -> (s, state)``: the same.
        kernel_grad: ``@triton.jit`` function ``(x, state, gs, gstate, THRESHOLD, DECAY, SURROGATE, WIDTH, DETACH, SOFT,
            CONSTANTS) -> (gx, gstate)``: gradients at x and at the states before the step from those at the spikes and
            at the states after it. ``surrogate_grad(d, SURROGATE, WIDTH)`` is the surrogate's value.
        states: Number of states; the first is the membrane potential.
        spikes: ``binary``, 0 or 1; ``ternary``, -1, 0 or 1, which no bit holds; or ``levels``, other values too, for
            which there is no estimate of energy either.
        constants: Numbers that both kernels get as ``CONSTANTS``. One that counts loops has to be named in the kernel
            first: ``LEVELS: tl.constexpr = CONSTANTS[0]``.
    """

    name: str
    step: Callable[..., tuple[Tensor, State]]
    kernel: Any
    kernel_grad: Any
    states: int = 1
    spikes: str = SPIKES[0]
    constants: tuple[float, ...] = ()


_surrogates: dict[str, Surrogate] = {}
_neurons: dict[str, Neuron] = {}
_names = {number: (LIF, name) for number, name in enumerate(BUILT_IN)}
_numbers = {names: number for number, names in _names.items()}


def register_surrogate(surrogate: Surrogate, replace: bool = False) -> Surrogate:
    """Make a surrogate known by its name, in this process.

    Args:
        surrogate: Its definition.
        replace: Take the place of another of this name; networks that have it compute the new one.

    Raises:
        ValueError: The name or a function is none, or the name is taken.
    """
    _check(surrogate, Surrogate, ("derivative", "kernel"), _surrogates, replace, BUILT_IN)
    if surrogate.integral is not None and not callable(surrogate.integral):
        raise ValueError(
            f"expected integral of the surrogate {surrogate.name!r} as a function or None, got "
            f"{shown(surrogate.integral)}"
        )
    _surrogates[surrogate.name] = surrogate
    _number_pairs()
    return surrogate


def register_neuron(neuron: Neuron, replace: bool = False) -> Neuron:
    """Make a neuron known by its name, in this process.

    Args:
        neuron: Its definition.
        replace: Take the place of another of this name; networks that have it compute the new one.

    Raises:
        ValueError: The name, a function, the number of states, the kind of spikes or a constant is none, or the name is
            taken.
    """
    _check(neuron, Neuron, ("step", "kernel", "kernel_grad"), _neurons, replace, RESERVED)
    states = neuron.states
    if isinstance(states, bool) or not isinstance(states, int) or not 1 <= states <= 8:
        raise ValueError(f"expected states of a neuron as an integer from 1 to 8, got {shown(states)}: count them")
    if neuron.spikes not in SPIKES:
        raise ValueError(
            f"expected spikes of a neuron out of {SPIKES}, got {shown(neuron.spikes)}: choose one of these"
        )
    numbers = isinstance(neuron.constants, tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in neuron.constants
    )
    if not numbers:
        raise ValueError(
            f"expected constants of a neuron as a tuple of finite numbers, got {shown(neuron.constants)}: kernels are "
            "compiled for them"
        )
    _neurons[neuron.name] = neuron
    _number_pairs()
    return neuron


# Names of what `LIFSpec` computes itself, and of networks' neurons that learn.
RESERVED = (LIF, "plif", "plif_channel")


def _check(
    value: Any, kind: type, functions: tuple[str, ...], known: dict[str, Any], replace: bool, reserved: tuple[str, ...]
) -> None:
    what = kind.__name__.lower()
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}, got {shown(value)}: use {kind.__name__}(...)")
    name = value.name  # type: ignore[attr-defined]
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise ValueError(
            f"expected the name of a {what} of lower-case letters, digits and _, got {shown(name)}: files store it"
        )
    for field in functions:
        if not callable(getattr(value, field)):
            raise ValueError(
                f"expected {field} of the {what} {name!r} as a function, got {shown(getattr(value, field))}"
            )
        if field.startswith("kernel") and HAS_TRITON and not isinstance(getattr(value, field), KernelInterface):
            raise ValueError(
                f"expected {field} of the {what} {name!r} as a function for Triton, got a plain one: put @triton.jit "
                "above it"
            )
    if name in reserved or (name in known and not replace):
        advice = "choose another" if name in reserved else "choose another, or replace it with replace=True"
        raise ValueError(f"expected a new name for a {what}, got {name!r}, which is taken: {advice}")


def _number_pairs() -> None:
    for neuron in (LIF, *_neurons):
        for surrogate in (*BUILT_IN, *_surrogates):
            if (neuron, surrogate) not in _numbers:
                number = int.from_bytes(hashlib.sha256(f"{neuron} {surrogate}".encode()).digest()[:7], "big")
                assert number > len(BUILT_IN) and number not in _names  # 2^56 numbers
                _names[number], _numbers[neuron, surrogate] = (neuron, surrogate), number
    kernel_constants.cache_clear()


def surrogate_names() -> tuple[str, ...]:
    """Names of all surrogates: the four built in, and those registered."""
    return (*BUILT_IN, *_surrogates)


def neuron_names() -> tuple[str, ...]:
    """Names of all neurons: ``lif``, and those registered."""
    return (LIF, *_neurons)


def own_surrogate(name: str) -> Surrogate:
    """The definition of a registered surrogate."""
    return _surrogates[name]


def neuron_of(name: str) -> Neuron | None:
    """The definition of a registered neuron; None for ``lif``."""
    return None if name == LIF else _neurons[name]


def number_of(neuron: str, surrogate: str) -> int:
    """The number under which operators take the two."""
    return _numbers[neuron, surrogate]


def names_of(number: int) -> tuple[str, str]:
    """Neuron and surrogate of a number.

    Raises:
        ValueError: No pair registered in this process has it.
    """
    if number not in _names:
        raise ValueError(
            f"expected the number of a neuron and surrogate that are registered, got {number}: import the module that "
            "registers them"
        )
    return _names[number]


def neuron_by(number: int) -> Neuron | None:
    """The definition of a number's neuron; None for ``lif``."""
    return neuron_of(names_of(number)[0])


def states_by(number: int) -> int:
    """How many states the neuron of a number has."""
    neuron = neuron_by(number)
    return 1 if neuron is None else neuron.states


@functools.lru_cache(maxsize=256)
def kernel_constants(number: int, backward: bool) -> dict[str, Any]:
    """The neuron as constants of kernels; of ``lif`` those that have no default, which a launch need not bind.

    Args:
        number: Of neuron and surrogate.
        backward: With the surrogate and the step's derivative.

    Returns:
        STEP, STATES and CONSTANTS; with ``backward`` also STEP_GRAD. And with ``backward`` SURROGATE, for ``lif`` too.
    """
    neuron, (_, surrogate) = neuron_by(number), names_of(number)
    constants: dict[str, Any] = {}
    if neuron is not None:
        constants = dict(STEP=neuron.kernel, STATES=neuron.states, CONSTANTS=neuron.constants)
    if backward:
        built_in = surrogate in BUILT_IN
        constants["SURROGATE"] = BUILT_IN.index(surrogate) if built_in else _surrogates[surrogate].kernel
        if neuron is not None:
            constants["STEP_GRAD"] = neuron.kernel_grad
    return constants
