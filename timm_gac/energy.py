"""Energy as the field counts it: what every convolution and linear layer of a network really computes.

`EnergyMeter` watches the operands of the layers while a network runs; `EnergyReport` adds them up under three
conventions. Counts stay on the device until the report is made. Batch norm is taken as folded; additions of
residuals, neurons and memory traffic are left out, as in the literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import GatedAttentionCoding
from .energy_tables import CONVENTIONS, COSTS, EnergyCosts, LayerCount, Operations, ann_macs

__all__ = ["EnergyMeter", "EnergyReport", "measure_energy"]

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ENTRIES = ("forward", "forward_steps", "forward_features", "forward_intermediates")


class _Counter:
    """Running counts of one layer.

    Args:
        name: Name of the layer.
        layer: The layer.
        kind: Its kind, where the name or the place tells.
    """

    def __init__(self, name: str, layer: Layer, kind: str) -> None:
        self.name, self.layer, self.kind = name, layer, kind
        self.rows = 0  # frames seen by each step
        self.macs = 0
        self.nonzero: Tensor | None = None  # [steps, *operand without batch]
        self.real: Tensor | None = None  # [] bool: some value was none of 0, 1 and -1

    def add(self, operand: Tensor, output: Tensor, batch: int) -> None:
        """Count one run: operand and output are time-folded, ``(steps * batch, ...)``."""
        if operand.shape[0] % batch != 0:
            raise ValueError(
                f"expected an operand of steps * batch rows with batch {batch} in layer {self.name!r}, got "
                f"{tuple(operand.shape)}: fold time into the first axis"
            )
        x = operand.detach().unflatten(0, (operand.shape[0] // batch, batch))
        nonzero = (x != 0).to(torch.float32).sum(1)
        # Values of at most 1 that add up to their number are all 1. Exact in float32 up to a batch of 2**24.
        size = x.abs()
        real = (size.sum(1, dtype=torch.float32) != nonzero).any() | (size.amax() > 1)
        macs = self.layer.weight.numel() * math.prod(output.shape[2:])
        if isinstance(self.layer, nn.Linear):
            macs = self.layer.weight.numel() * math.prod(output.shape[1:-1])
        if self.nonzero is None:
            self.nonzero, self.real, self.macs = nonzero.to(torch.int64), real, macs
        elif self.nonzero.shape != nonzero.shape:
            raise ValueError(
                f"expected operands of {tuple(self.nonzero.shape)} in layer {self.name!r}, got "
                f"{tuple(nonzero.shape)}: measure images of one size and frames of one number at a time"
            )
        else:
            self.nonzero += nonzero.to(torch.int64)
            self.real = self.real | real
        self.rows += batch

    def result(self, images: int, kind: str) -> LayerCount:
        """What was counted, per image; the only place that waits for the device."""
        assert self.nonzero is not None and self.real is not None
        counts = self.nonzero.cpu().double()
        positions = counts[0].numel()
        runs = self.rows / images
        effective = _reach(counts, (self.layer.weight != 0).cpu(), self.layer)
        dense = _reach(torch.ones_like(counts[:1]), torch.ones(self.layer.weight.shape, dtype=torch.bool), self.layer)
        return LayerCount(
            name=self.name,
            kind=kind,
            macs=self.macs,
            step_runs=(runs,) * len(counts),
            binary=not bool(self.real),
            step_rates=tuple((counts.flatten(1).sum(1) / (self.rows * positions)).tolist()),
            step_effective=tuple((effective / images).tolist()),
            dense=float(dense) * runs * len(counts),
        )


def _reach(counts: Tensor, mask: Tensor, layer: Layer) -> Tensor:
    """Products of counted values with the weights of a mask, padding excluded: ``(steps, ...)`` -> ``(steps,)``."""
    if isinstance(layer, nn.Linear):
        return (counts * mask.double().sum(0)).flatten(1).sum(1)
    # All outputs of a group are summed anyway: one output channel with the number of weights per tap does for them.
    taps = mask.double().unflatten(0, (layer.groups, -1)).sum(1)
    padding = layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else None
    # Values of the padding are 0 in every mode that the counted networks use: padded zeros add nothing.
    x = counts if padding is None else F.pad(counts, padding)
    convolve = _CONVOLVE[layer.weight.ndim - 2]
    amount: Any = 0 if padding is not None else layer.padding
    return convolve(x, taps, None, layer.stride, amount, layer.dilation, layer.groups).flatten(1).sum(1)


class EnergyMeter:
    """Counts the operations of a network while it runs, within ``with``.

    It hooks inputs and outputs of convolutions and linear layers, so it sees the operands that are really used, with
    any kernels behind the neurons, and with batch norms folded or not. It does not see into a compiled network or a
    CUDA graph's replay: measure the plain module.

    Args:
        model: The network, in eval mode; T is its ``num_steps``.
        num_steps: Number of time steps T, where the network has no ``num_steps``.

    Raises:
        ValueError: The network is compiled, has no layers to count, or T is not known.

    Example:
        >>> meter = EnergyMeter(model)  # doctest: +SKIP
        >>> with meter, torch.no_grad():  # doctest: +SKIP
        ...     model(images)
        >>> meter.report().totals()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, num_steps: int | None = None) -> None:
        if hasattr(model, "_orig_mod"):
            raise ValueError("expected a plain module, got a compiled one: measure the module given to torch.compile")
        steps = getattr(model, "num_steps", None) if num_steps is None else num_steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"expected num_steps of at least 1, got {steps!r}: give num_steps")
        self.model, self.num_steps = model, steps
        gates = [name for name, module in model.named_modules() if isinstance(module, GatedAttentionCoding)]
        self._counters = {
            name: _Counter(name, module, _kind(name, module, gates))
            for name, module in model.named_modules()
            if isinstance(module, _LAYERS)
        }
        if not self._counters:
            raise ValueError(f"expected a network with convolutions or linear layers, got {type(model).__name__}")
        self.images = 0
        self._frames = False
        self._order: list[str] = []  # in which the layers ran first
        self._batch, self._depth = 0, 0
        self._removers: list[Callable[[], None]] = []

    def __enter__(self) -> EnergyMeter:
        """Start to count; counts of an earlier ``with`` are kept."""
        if self._removers:
            raise ValueError("expected a meter that is not counting yet, got one within `with`: use another meter")
        for counter in self._counters.values():
            self._removers.append(counter.layer.register_forward_hook(self._hook(counter)).remove)
        for name in _ENTRIES:
            if hasattr(self.model, name):
                self._watch(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to count and leave the network as it was."""
        while self._removers:
            self._removers.pop()()

    def _watch(self, name: str) -> None:
        """Learn the batch size from a call of the network's method."""
        method = getattr(self.model, name)

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self._batch, self._frames = x.shape[0], x.ndim == 5
                self.images += x.shape[0]
            self._depth += 1
            try:
                return method(x, *args, **kwargs)
            finally:
                self._depth -= 1

        replaced = self.model.__dict__.get(name)
        self.model.__dict__[name] = watched

        def restore() -> None:
            if replaced is None:
                del self.model.__dict__[name]
            else:
                self.model.__dict__[name] = replaced

        self._removers.append(restore)

    def _hook(self, counter: _Counter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._depth == 0:
                return  # a layer called on its own
            if counter.name not in self._order:
                self._order.append(counter.name)
            counter.add(inputs[0], output, self._batch)

        return count

    def report(self, costs: EnergyCosts | str = "45nm-float32", weights: str = "") -> EnergyReport:
        """Everything counted so far, per image.

        Args:
            costs: Cost table, or its name in `COSTS`.
            weights: Where the weights are from, to be kept with the figures.

        Raises:
            ValueError: Nothing was counted, or there is no such cost table.
        """
        if self.images == 0 or not self._order:
            raise ValueError("expected a meter that has seen images, got none: run the network within `with meter:`")
        if isinstance(costs, str):
            if costs not in COSTS:
                raise ValueError(f"expected costs as one of {list(COSTS)}, got {costs!r}: choose one of these")
            costs = COSTS[costs]
        stem = next((name for name in self._order if self._counters[name].kind != "attention"), None)
        layers = []
        for name in self._order:
            counter = self._counters[name]
            layers.append(counter.result(self.images, "stem" if name == stem else counter.kind))
        config = getattr(self.model, "pretrained_cfg", None)
        architecture = getattr(config, "architecture", None) or (config or {}).get("architecture")
        return EnergyReport(
            model=architecture or type(self.model).__name__,
            num_steps=self.num_steps,
            images=self.images,
            frames=self._frames,
            layers=tuple(layers),
            costs=costs,
            weights=weights,
            not_run=tuple(name for name in self._counters if name not in self._order),
        )


def _kind(name: str, module: nn.Module, gates: list[str]) -> str:
    if any(name.startswith(f"{gate}.") if gate else True for gate in gates):
        return "attention"
    if {"downsample", "shortcut"} & set(name.split(".")):
        return "shortcut"
    return "head" if isinstance(module, nn.Linear) else "conv"


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
        not_run: Layers that hold weights but did not run.
    """

    model: str
    num_steps: int
    images: int
    frames: bool
    layers: tuple[LayerCount, ...]
    costs: EnergyCosts
    weights: str = ""
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


@torch.no_grad()
def measure_energy(
    model: nn.Module, batches: Iterable[Tensor], costs: EnergyCosts | str = "45nm-float32", weights: str = ""
) -> EnergyReport:
    """The energy of a network on images, in the mode (eval or training) it is in.

    Args:
        model: The network.
        batches: Images ``(B, C, H, W)`` or frames ``(B, T, C, H, W)``, on the network's device.
        costs: Cost table, or its name in `COSTS`.
        weights: Where the weights are from, to be kept with the figures.

    Raises:
        ValueError: There are no images; or see `EnergyMeter`.
    """
    meter = EnergyMeter(model)
    with meter:
        for images in batches:
            model(images)
    return meter.report(costs, weights)
