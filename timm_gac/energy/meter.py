"""`EnergyMeter`: counts the operations of any network while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from threading import RLock, get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels import LIFSpec

from ..inference.record import forward_hooks
from ..layers.encoder import GatedAttentionCoding
from ..models.ann_resnet import refuse_ann
from ..runtime.dtypes import float32_as
from .counter import LAYERS, Counter
from .report import EnergyReport
from .tables import EnergyCosts, cost_table

# Meters replace methods of a network: two at once in different threads would not restore them.
_LOCK = RLock()
_ENTRIES = ("forward", "forward_steps", "forward_features", "forward_intermediates")


class EnergyMeter:
    """Counts the operations of a network while it runs, within ``with``.

    Hooks on convolutions and linear layers see the operands that are really used, whatever kernels compute the neurons
    and whether batch norms are folded or not. A compiled network or the replay of a CUDA graph runs no hooks: measure
    the plain module.

    Args:
        model: The network, in eval mode; T is its ``num_steps``.
        num_steps: Number of time steps T, where the network has no ``num_steps``.

    Raises:
        ValueError: The network is compiled or an ANN of this package, has no layers to count or spikes of several
            levels, which no convention of operations covers; or T is not known.

    Examples:
        >>> meter = EnergyMeter(model)  # doctest: +SKIP
        >>> with meter, torch.no_grad():  # doctest: +SKIP
        ...     model(images)
        >>> meter.report().totals()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, num_steps: int | None = None) -> None:
        if hasattr(model, "_orig_mod"):
            raise ValueError("expected a plain module, got a compiled one: measure the module given to torch.compile")
        refuse_ann(model, "an estimate of energy, which has that of the ANN of the same shape beside it")
        steps = getattr(model, "num_steps", None) if num_steps is None else num_steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"expected num_steps of at least 1, got {steps!r}: give num_steps")
        self.model, self.num_steps = model, steps
        gates = [name for name, module in model.named_modules() if isinstance(module, GatedAttentionCoding)]
        self._counters = {
            name: Counter(name, module, _kind(name, module, gates))
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
        }
        for module in model.modules():
            spec = getattr(module, "spec", None)
            if isinstance(spec, LIFSpec):
                spec.refuse_spikes("an estimate of energy", "levels")
        if not self._counters:
            raise ValueError(f"expected a network with convolutions or linear layers, got {type(model).__name__}")
        self.images = 0
        self._frames = False
        self._order: list[str] = []  # in which the layers ran first
        self._batch, self._depth = 0, 0
        self._counting: ExitStack | None = None  # takes away what was put on the network

    def __enter__(self) -> EnergyMeter:
        """Start counting; counts of an earlier ``with`` are kept.

        Only calls of this thread count; a meter of another thread waits until this one has stopped.
        """
        if self._counting is not None:
            raise ValueError("expected a meter that is not counting yet, got one within `with`: use another meter")
        layers = {name: counter.layer for name, counter in self._counters.items()}
        with ExitStack() as stack:
            stack.enter_context(_LOCK)
            stack.enter_context(forward_hooks(layers, self._count))
            for name in _ENTRIES:
                if hasattr(self.model, name):
                    self._watch(name, stack)
            self._counting = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting and leave the network as it was."""
        counting, self._counting = self._counting, None
        if counting is not None:
            counting.close()

    def _watch(self, name: str, stack: ExitStack) -> None:
        """Learn the batch size from a call of the network's method, until the stack is closed."""
        method, thread = getattr(self.model, name), get_ident()

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if get_ident() != thread:
                return method(x, *args, **kwargs)
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

        stack.callback(restore)

    def _count(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if self._depth == 0:
            return  # a layer called on its own
        if name not in self._order:
            self._order.append(name)
        self._counters[name].add(inputs[0], output, self._batch)

    def report(
        self, costs: EnergyCosts | str = "45nm-float32", weights: str = "", trained: bool | None = None
    ) -> EnergyReport:
        """Everything counted so far, per image.

        Args:
            costs: Cost table, or its name in `COSTS`.
            weights: Where the weights are from, to be kept with the figures.
            trained: Whether they are trained, to be kept too; None where that is not known.

        Raises:
            ValueError: Nothing was counted, or there is no such cost table.
        """
        if self.images == 0 or not self._order:
            raise ValueError("expected a meter that has seen images, got none: run the network within `with meter:`")
        stem = next((name for name in self._order if self._counters[name].kind != "attention"), None)
        ran = [(name, self._counters[name]) for name in self._order]
        layers = [counter.result(self.images, "stem" if name == stem else counter.kind) for name, counter in ran]
        config = getattr(self.model, "pretrained_cfg", None)
        architecture = getattr(config, "architecture", None) or (config or {}).get("architecture")
        return EnergyReport(
            model=architecture or type(self.model).__name__,
            num_steps=self.num_steps,
            images=self.images,
            frames=self._frames,
            layers=tuple(layers),
            costs=cost_table(costs) if isinstance(costs, str) else costs,
            weights=weights,
            trained=trained,
            not_run=tuple(name for name in self._counters if name not in self._order),
        )


def _kind(name: str, module: nn.Module, gates: list[str]) -> str:
    if any(name.startswith(f"{gate}.") if gate else True for gate in gates):
        return "attention"
    if {"downsample", "shortcut"} & set(name.split(".")):
        return "shortcut"
    return "head" if isinstance(module, nn.Linear) else "conv"


@float32_as("ieee")
@torch.no_grad()
def measure_energy(
    model: nn.Module,
    batches: Iterable[Tensor],
    costs: EnergyCosts | str = "45nm-float32",
    weights: str = "",
    trained: bool | None = None,
) -> EnergyReport:
    """The energy of a network on images, in the mode (eval or training) it is in.

    Args:
        model: The network.
        batches: Images ``(B, C, H, W)`` or frames ``(B, T, C, H, W)``, on the network's device.
        costs: Cost table, or its name in `COSTS`.
        weights: Where the weights are from, to be kept with the figures.
        trained: Whether they are trained, to be kept too; None where that is not known.

    Raises:
        ValueError: There are no images; or see `EnergyMeter`.
    """
    meter = EnergyMeter(model)
    with meter:
        for images in batches:
            model(images)
    return meter.report(costs, weights, trained)
