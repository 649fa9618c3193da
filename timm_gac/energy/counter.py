"""What one layer computes: its real operands, counted on the device while the network runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tables import LayerCount

__all__ = ["LAYERS", "Counter", "Layer"]

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Counter:
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
