"""Cost of an operation, and conventions that turn counts into operations: one entry of a table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HOROWITZ = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, 45 nm at 0.9 V"


@dataclass(frozen=True)
class EnergyCosts:
    """Energy of one operation in picojoules; memory traffic is excluded.

    Args:
        name: Name of the table.
        multiply_pj: One multiplication.
        add_pj: One addition.
        source: Where the numbers are from.
    """

    name: str
    multiply_pj: float
    add_pj: float
    source: str

    def __post_init__(self) -> None:
        if self.multiply_pj < 0 or self.add_pj < 0:
            raise ValueError(f"expected costs of at least 0 pJ, got {self}: give picojoules per operation")

    @property
    def mac_pj(self) -> float:
        """One multiply-accumulate, in pJ."""
        return self.multiply_pj + self.add_pj

    @property
    def ac_pj(self) -> float:
        """One accumulate, in pJ."""
        return self.add_pj


COSTS = {
    costs.name: costs
    for costs in (
        EnergyCosts("45nm-float32", 3.7, 0.9, HOROWITZ),
        EnergyCosts("45nm-float16", 1.1, 0.4, HOROWITZ),
        EnergyCosts("45nm-int8", 0.2, 0.03, HOROWITZ + "; sums of 8 bits"),
        EnergyCosts("45nm-int8-acc32", 0.2, 0.1, HOROWITZ + "; products of 8 bits summed in 32 bits"),
    )
}


def cost_table(name: str) -> EnergyCosts:
    """The cost table of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in COSTS:
        raise ValueError(f"expected costs as one of {list(COSTS)}, got {name!r}: choose one of these")
    return COSTS[name]


@dataclass(frozen=True)
class LayerCount:
    """Counts of one layer, per image; tuples have one entry for each time step of the layer.

    Args:
        name: Name of the module.
        kind: ``stem``, ``attention``, ``shortcut``, ``conv`` or ``head``.
        macs: Multiply-accumulates of one run on one frame, positions in the padding included.
        step_runs: Runs per image at each step: one entry where the layer runs once for all steps, else T.
        binary: Every value of the operand was 0, 1 or -1.
        step_rates: Share of the operand's values that is not 0: the firing rate, where binary.
        step_effective: Operations per image with neither a zero weight nor a zero operand nor padding.
        dense: Operations per image with all weights and values, padding excluded.
    """

    name: str
    kind: str
    macs: int
    step_runs: tuple[float, ...]
    binary: bool
    step_rates: tuple[float, ...]
    step_effective: tuple[float, ...]
    dense: float

    @property
    def runs(self) -> float:
        """Runs per image."""
        return sum(self.step_runs)

    @property
    def rate(self) -> float:
        """Share of the operand's values that is not 0, over all steps."""
        return sum(r * n for r, n in zip(self.step_rates, self.step_runs, strict=True)) / self.runs

    @property
    def step_sops(self) -> tuple[float, ...]:
        """Synaptic operations per image of each step: firing rate times MACs."""
        return tuple(r * n * self.macs for r, n in zip(self.step_rates, self.step_runs, strict=True))

    @property
    def sops(self) -> float:
        """Synaptic operations per image: firing rate times steps times MACs."""
        return sum(self.step_sops)


@dataclass(frozen=True)
class Operations:
    """Operations per image, one entry a time step; what runs once for all steps stands at the first.

    Args:
        macs: Multiply-accumulates.
        acs: Accumulates.
    """

    macs: tuple[float, ...]
    acs: tuple[float, ...]


def _spread(values: tuple[float, ...], num_steps: int) -> tuple[float, ...]:
    """Values of a layer by step; those of a layer that ran once go to the first step."""
    return values if len(values) == num_steps else (sum(values), *[0.0] * (num_steps - 1))


def _paper(layer: LayerCount, num_steps: int, frames: bool) -> Operations:
    """Stem as MAC, once; the encoder's attention not counted; all else accumulates non-zero inputs at every step."""
    none = (0.0,) * num_steps
    if layer.kind == "attention":
        return Operations(none, none)
    if layer.kind == "stem":
        macs = (float(layer.macs),) * num_steps if frames else _spread((float(layer.macs),), num_steps)
        return Operations(macs, none)
    if len(layer.step_runs) == num_steps:
        return Operations(none, layer.step_sops)
    # The head runs once, on rates; counted as the paper's spiking layer it runs at every step.
    return Operations(none, (layer.sops,) * num_steps)


def _strict(layer: LayerCount, num_steps: int, frames: bool) -> Operations:
    """MAC wherever the measured operand is real-valued, as often as the layer runs; else accumulates of spikes."""
    none = (0.0,) * num_steps
    if layer.binary:
        return Operations(none, _spread(layer.step_sops, num_steps))
    return Operations(_spread(tuple(n * layer.macs for n in layer.step_runs), num_steps), none)


def _neurobench(layer: LayerCount, num_steps: int, frames: bool) -> Operations:
    """NeuroBench's Effective_MACs and Effective_ACs: zero activations, zero weights and padding cost nothing."""
    none, effective = (0.0,) * num_steps, _spread(layer.step_effective, num_steps)
    return Operations(none, effective) if layer.binary else Operations(effective, none)


CONVENTIONS: dict[str, Callable[[LayerCount, int, bool], Operations]] = {
    "paper": _paper,
    "strict": _strict,
    "neurobench": _neurobench,
}


def ann_macs(layers: tuple[LayerCount, ...]) -> float:
    """Multiply-accumulates of the ANN of the same shape: every layer but the encoder's attention once, dense."""
    return float(sum(layer.macs for layer in layers if layer.kind != "attention"))
