"""What a neuron and a batch norm compute, as frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .common.messages import shown
from .registry import BUILT_IN as SURROGATES
from .registry import LIF, neuron_names, neuron_of, number_of, surrogate_names

RESETS = ("hard", "soft")
__all__ = ["CIFAR", "IMAGENET", "RESETS", "SURROGATES", "LIFSpec", "ResidualNorm"]


def _number(name: str, value: Any) -> float:
    """A field as a plain float: kernels are compiled for it, so it is no tensor that learns."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"expected {name} as a plain number, got a tensor that requires a gradient: specs hold plain numbers, "
            "which do not learn, give float(...); for one that does, neuron='plif' of a network, "
            "LIF(learnable='layer') or lif(x, decay=...)"
        )
    single = isinstance(value, (int, float)) or getattr(value, "shape", None) == ()
    try:
        if not single or isinstance(value, (bool, complex)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(
            f"expected {name} as one plain number, got {shown(value)}: specs hold plain numbers, give one such as 0.5"
        ) from None


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy's
        return bool(value)
    raise ValueError(f"expected {name} as True or False, got {shown(value)}: give one of these")


@dataclass(frozen=True)
class LIFSpec:
    """One leaky integrate-and-fire neuron: dynamics and surrogate gradient.

    With u the membrane before reset, v after it, s the spike, and d = u - threshold:

        u[t] = decay * v[t-1] + x[t]
        s[t] = 1 if u[t] > threshold else 0
        v[t] = (1 - s[t]) * u[t]              (reset='hard')
        v[t] = u[t] - threshold * s[t]        (reset='soft')

    The derivative ds/du is replaced, in the backward pass only, by a surrogate of unit area:

    | surrogate | value at d | `width` |
    |---|---|---|
    | triangle | `max(0, width - abs(d)) / width**2` | half-width of the support |
    | rectangle | `1 / (2 * width) where abs(d) < width, else 0` | half-width of the support |
    | atan | `1 / (width * (1 + (pi * d / width)**2))` | reciprocal of the peak |
    | sigmoid | `a * p * (1 - p), a = 4 / width, p = sigmoid(a * d)` | reciprocal of the peak |

    Args:
        threshold: Membrane potential above which (strictly) the neuron fires.
        decay: Fraction of the membrane potential that survives one step, in [0, 1].
        surrogate: One of ``triangle``, ``rectangle``, ``atan``, ``sigmoid``, or one of `register_surrogate`.
        width: Width of the surrogate, in units of membrane potential.
        detach_reset: Treat the spike in the reset as a constant in the backward pass.
        reset: ``hard`` resets to 0, ``soft`` subtracts the threshold.
        neuron: ``lif``, which is the above; ``ternary``, ``integer`` or ``adaptive``, see `gac_kernels.neuron.models`;
            or one of `register_neuron`. The other fields are what it makes of them.

    Raises:
        ValueError: A field is out of range, or a tensor that learns or holds more than one number; the message names
            the field and its valid values.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582); the two dialects are those of its published models.
    """

    threshold: float = 1.0
    decay: float = 0.5
    surrogate: str = "triangle"
    width: float = 1.0
    detach_reset: bool = False
    reset: str = "hard"
    neuron: str = LIF

    def __post_init__(self) -> None:
        for name in ("threshold", "decay", "width"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "detach_reset", _truth("detach_reset", self.detach_reset))
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"expected a finite threshold > 0, got {self.threshold!r}: give one such as 1.0")
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"expected a decay in [0, 1], got {self.decay!r}: give one such as 0.5")
        if not isinstance(self.surrogate, str) or self.surrogate not in surrogate_names():
            raise ValueError(
                f"expected a surrogate out of {surrogate_names()}, got {shown(self.surrogate)}: choose one of these, "
                "or import the module that registers it"
            )
        if not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"expected a finite surrogate width > 0, got {self.width!r}: give one such as 1.0")
        if not isinstance(self.reset, str) or self.reset not in RESETS:
            raise ValueError(f"expected a reset out of {RESETS}, got {shown(self.reset)}: choose one of these")
        if not isinstance(self.neuron, str) or self.neuron not in neuron_names():
            raise ValueError(
                f"expected a neuron out of {neuron_names()}, got {shown(self.neuron)}: choose one of these, or import "
                "the module that registers it"
            )

    @property
    def surrogate_id(self) -> int:
        """Number of surrogate and neuron, the form in which operators take them: see `gac_kernels.registry`."""
        return number_of(self.neuron, self.surrogate)

    @property
    def is_lif(self) -> bool:
        """Whether it is the leaky integrate-and-fire neuron, which all operators have."""
        return self.neuron == LIF

    @property
    def spikes(self) -> str:
        """What its spikes are: ``binary``, ``ternary`` or ``levels``, see `gac_kernels.registry.Neuron`."""
        neuron = neuron_of(self.neuron)
        return "binary" if neuron is None else neuron.spikes

    def refuse_others(self, what: str) -> None:
        """Raise unless it is the leaky integrate-and-fire neuron.

        Args:
            what: What is for that neuron alone, such as ``8-bit inference``.

        Raises:
            ValueError: It is another neuron; the message names both.
        """
        if not self.is_lif:
            raise ValueError(
                f"expected neuron 'lif' for {what}, got {self.neuron!r}: it has none, leave it out or use neuron='lif'"
            )

    def refuse_spikes(self, what: str, *kinds: str) -> None:
        """Raise where spikes are of one of these kinds.

        Args:
            what: What does not take such spikes, such as ``packed bits``.
            kinds: See `spikes`.

        Raises:
            ValueError: They are; the message names neuron and what.
        """
        if self.spikes in kinds:
            values = {"ternary": "-1, 0 and 1", "levels": "of several levels"}.get(self.spikes, "0 and 1")
            raise ValueError(
                f"expected other spikes for {what}, got those of neuron {self.neuron!r}, {values}: it has none, leave "
                "it out or use neuron='lif'"
            )

    @property
    def soft_reset(self) -> bool:
        """Whether the reset subtracts the threshold rather than clearing the membrane."""
        return self.reset == "soft"

    @property
    def op_arguments(self) -> tuple[float, float, int, float, bool, bool]:
        """The spec as operators with a backward pass take it, in their order.

        Threshold, decay, number of surrogate and neuron, width, whether the reset is detached and whether it is soft.
        """
        return self.threshold, self.decay, self.surrogate_id, self.width, self.detach_reset, self.soft_reset

    @property
    def forward_arguments(self) -> tuple[float, float, bool]:
        """The spec as operators for inference take it: threshold, decay and whether the reset is soft.

        Raises:
            ValueError: It is another neuron than ``lif``.
        """
        self.refuse_others("a convolution or integers with a neuron in one operator")
        return self.threshold, self.decay, self.soft_reset


class ResidualNorm(NamedTuple):
    """Batch norm of a residual: statistics and, where the other norm has them, scale and shift; (C,) each."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


CIFAR = LIFSpec(threshold=1.0, decay=0.5, surrogate="triangle", width=1.0, detach_reset=False)
IMAGENET = LIFSpec(threshold=0.5, decay=0.25, surrogate="rectangle", width=0.5, detach_reset=True)
