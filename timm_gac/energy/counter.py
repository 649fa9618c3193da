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
        self.nonzero: Tensor | None = None  # [steps, *operand without batch], float32: exact up to 2**24 images
        self.real: Tensor | None = None  # [] bool: some value was none of 0, 1 and -1

    def add(self, operand: Tensor, output: Tensor, batch: int) -> None:
        """Count one run: operand and output are time-folded, ``(steps * batch, ...)``."""
        if operand.shape[0] % batch != 0:
            raise ValueError(
                f"expected an operand of steps * batch rows with batch {batch} in layer {self.name!r}, got "
                f"{tuple(operand.shape)}: fold time into the first axis"
            )
        x = operand.detach().unflatten(0, (operand.shape[0] // batch, batch))
        # On a CPU step by step: temporaries beyond 32 MB come fresh from the system, which costs ten times the sums.
        # There a known real operand is not looked at again; on a GPU asking would wait for the device.
        on_cpu = x.device.type == "cpu"
        known = on_cpu and self.real is not None and bool(self.real)
        looked = [_look(part, not known) for part in (x.split(1) if on_cpu else (x,))]
        nonzero = torch.cat([counts for counts, _ in looked])
        real = torch.stack([is_real for _, is_real in looked]).any()
        macs = self.layer.weight.numel() * math.prod(output.shape[2:])
        if isinstance(self.layer, nn.Linear):
            macs = self.layer.weight.numel() * math.prod(output.shape[1:-1])
        if self.nonzero is None:
            self.nonzero, self.real, self.macs = nonzero, real, macs
        elif self.nonzero.shape != nonzero.shape:
            raise ValueError(
                f"expected operands of {tuple(self.nonzero.shape)} in layer {self.name!r}, got "
                f"{tuple(nonzero.shape)}: measure images of one size and frames of one number at a time"
            )
        else:
            self.nonzero += nonzero
            self.real = real if self.real is None else self.real | real
        self.rows += batch

    def result(self, images: int, kind: str) -> LayerCount:
        """What was counted, per image; the only place that waits for the device."""
        assert self.nonzero is not None and self.real is not None
        counts = self.nonzero.cpu().double()
        positions = counts[0].numel()
        runs = self.rows / images
        reach = _reach(counts.shape[1:], (self.layer.weight != 0).cpu(), self.layer)
        effective = (counts * reach).flatten(1).sum(1)
        full = torch.ones(self.layer.weight.shape, dtype=torch.bool)
        dense = _reach(counts.shape[1:], full, self.layer).sum()
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


def _look(x: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    """Number of values of ``(steps, batch, ...)`` that are not 0, over the batch, and if some is none of 0, 1, -1."""
    ones = x.sign().abs_()
    nonzero = ones.sum(1, dtype=torch.float32)
    if not check:
        return nonzero, torch.ones((), dtype=torch.bool, device=x.device)
    return nonzero, x.abs().sub_(ones).abs_().amax() != 0


def _reach(shape: torch.Size, mask: Tensor, layer: Layer) -> Tensor:
    """Products with the weights of a mask that each value of an operand takes part in, padding excluded, in float64.

    That is the derivative, by the operand, of the sum of a layer's outputs with the mask for weights.
    """
    if isinstance(layer, nn.Linear):
        return mask.double().sum(0).expand(shape)
    # All outputs of a group are summed anyway: one output channel with the number of weights per tap does for them.
    taps = mask.float().unflatten(0, (layer.groups, -1)).sum(1)  # counts below 2**24: exact
    padding = layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else None
    amount: Any = 0 if padding is not None else layer.padding
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, *shape, requires_grad=True)
        # Values of the padding are 0 in every mode that the counted networks use: padded zeros add nothing.
        padded = x if padding is None else F.pad(x, padding)
        convolve = _CONVOLVE[layer.weight.ndim - 2]
        outputs = convolve(padded, taps, None, layer.stride, amount, layer.dilation, layer.groups)
        (products,) = torch.autograd.grad(outputs.sum(), x)
    return products[0].double()
