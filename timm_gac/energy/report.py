"""`EnergyReport`: energy per image by convention, layer and time step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from .tables import CONVENTIONS, EnergyCosts, LayerCount, Operations, ann_macs


@dataclass(frozen=True)
class EnergyReport:
    """Counts and energies per image.

    Args:
        model: Name of the network.
        num_steps: Number of time steps T.
        images: Images that were measured.
        frames: They varied over time (event frames).
        layers: What was counted, in the order in which the layers ran.
        costs: What an operation costs.
        weights: Where the weights are from.
        trained: Whether they are trained; None where that is not known.
        not_run: Layers that hold weights but did not run.
    """

    model: str
    num_steps: int
    images: int
    frames: bool
    layers: tuple[LayerCount, ...]
    costs: EnergyCosts
    weights: str = ""
    trained: bool | None = None
    not_run: tuple[str, ...] = ()

    @property
    def ann_mj(self) -> float:
        """Energy of the ANN of the same shape, in mJ per image: all layers once, dense, without the encoder's gate."""
        return ann_macs(self.layers) * self.costs.mac_pj * 1e-9

    def operations(self, convention: str) -> dict[str, Operations]:
        """Operations of each layer by step under a convention.

        Raises:
            ValueError: There is no such convention.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f"expected a convention of {list(CONVENTIONS)}, got {convention!r}: choose one of these")
        count = CONVENTIONS[convention]
        return {layer.name: count(layer, self.num_steps, self.frames) for layer in self.layers}

    def layer_mj(self, convention: str) -> dict[str, float]:
        """Energy of each layer in mJ per image."""
        return {
            name: sum(map(self._mj, operations.macs, operations.acs))
            for name, operations in self.operations(convention).items()
        }

    def energy_by_step(self, convention: str) -> tuple[float, ...]:
        """Energy of an answer after 1, 2, ... T steps, in mJ per image: what early exit saves."""
        layers = self.operations(convention).values()
        macs = [sum(step) for step in zip(*(layer.macs for layer in layers), strict=True)]
        acs = [sum(step) for step in zip(*(layer.acs for layer in layers), strict=True)]
        return tuple(accumulate(map(self._mj, macs, acs)))

    def _mj(self, macs: float, acs: float) -> float:
        return (macs * self.costs.mac_pj + acs * self.costs.ac_pj) * 1e-9

    def totals(self) -> dict[str, dict[str, float]]:
        """Under each convention: MACs and ACs per image, energy in mJ, and its ratio to the ANN's."""
        rows = {}
        for convention in CONVENTIONS:
            layers = self.operations(convention).values()
            macs, acs = sum(sum(layer.macs) for layer in layers), sum(sum(layer.acs) for layer in layers)
            energy = self._mj(macs, acs)
            rows[convention] = {"macs": macs, "acs": acs, "energy_mj": energy, "of_ann": energy / self.ann_mj}
        rows["ann"] = {"macs": ann_macs(self.layers), "acs": 0.0, "energy_mj": self.ann_mj, "of_ann": 1.0}
        return rows

    @property
    def dense(self) -> float:
        """NeuroBench's Dense: operations per image with all weights and values, padding excluded."""
        return sum(layer.dense for layer in self.layers)
