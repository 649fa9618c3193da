"""Operation counts of one layer, from its real inputs, on the device while the network runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import count_spikes

from ..inference.integer import SpikeConv
from .tables import LayerCount

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | SpikeConv
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, SpikeConv)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Counter:
    """Running counts of one layer.

    Args:
        name: Name of the layer.
        layer: The layer.
        kind: Kind of the layer by its name and place: ``attention``, ``shortcut``, ``conv`` or ``head``.
    """

    def __init__(self, name: str, layer: Layer, kind: str) -> None:
        self.name, self.layer, self.kind = name, layer, kind
        self.rows = 0  # frames seen by each step
        self.macs = 0
        self.nonzero: Tensor | None = None  # [steps, *operand without batch], float32: exact up to 2**24 images
        self.real: Tensor | None = None  # [] bool: some value was none of 0, 1 and -1

    def add(self, operand: Tensor, output: Tensor | tuple[Tensor, ...], batch: int) -> None:
        """Count one run: operand and output are time-folded, ``(steps * batch, ...)``."""
        if operand.shape[0] % batch != 0:
            raise ValueError(
                f"expected an operand of steps * batch rows with batch {batch} in layer {self.name!r}, got "
                f"{tuple(operand.shape)}: fold time into the first axis"
            )
        x = operand.detach().unflatten(0, (operand.shape[0] // batch, batch))
        shape = torch.Size((len(x), *x.shape[2:]))
        if self.nonzero is None or self.real is None:
            self.nonzero = torch.zeros_like(x[:, 0], dtype=torch.float32)
            self.real = torch.zeros((), dtype=torch.bool, device=x.device)
            out = output[-1] if isinstance(output, tuple) else output  # membrane and spikes: one shape
            positions = out.shape[1:-1] if isinstance(self.layer, nn.Linear) else out.shape[2:]
            self.macs = self.layer.weight.numel() * math.prod(positions)
        elif self.nonzero.shape != shape:
            raise ValueError(
                f"expected operands of {tuple(self.nonzero.shape)} in layer {self.name!r}, got {tuple(shape)}: measure "
                "images of one size and frames of one number at a time"
            )
        if x.device.type == "cpu":
            # Step by step: temporaries beyond 32 MB come fresh from the system, which costs ten times the sums.
            for total, step in zip(self.nonzero, x, strict=True):
                self._add_step(total, step, self.real)
        else:  # one read of the operand, and no wait for the device
            count_spikes(operand, len(x), self.nonzero, self.real)
        self.rows += batch

    @staticmethod
    def _add_step(total: Tensor, x: Tensor, real: Tensor) -> None:
        """Count the values of a step ``(batch, ...)`` that are not 0; whether all are 0, 1 or -1 only while unknown."""
        if real:
            total += torch.ne(x, 0, out=torch.empty_like(x)).sum(0, dtype=torch.float32)
        elif torch.equal(x.square(), x):  # zeros and ones: their sum is their number
            total += x.sum(0, dtype=torch.float32)
        else:
            ones, distance = _ones(x)
            total += ones.sum(0, dtype=torch.float32)
            real |= distance != 0

    def result(self, images: int, kind: str) -> LayerCount:
        """What was counted, per image; the only place that waits for the device."""
        assert self.nonzero is not None and self.real is not None
        counts = self.nonzero.cpu()
        positions, channels = counts[0].numel(), counts.shape[1]
        runs = self.rows / images
        dense = reach = _reach(counts.shape[1:], self.layer)
        weight = self.layer.kernel if isinstance(self.layer, SpikeConv) else self.layer.weight.detach()
        if not bool(weight.abs().amin() > 0):
            reach = _masked_reach(counts.shape[1:], (weight != 0).cpu(), self.layer)
        if len(reach) == 1:  # the same for all channels, whose counts are added first: exact below 2**24
            exact = self.rows * counts.shape[1] <= 2**24
            counts = counts.sum(1, keepdim=True, dtype=torch.float32 if exact else torch.float64)
        counts = counts.double()
        effective = (counts * reach).flatten(1).sum(1)
        return LayerCount(
            name=self.name,
            kind=kind,
            macs=self.macs,
            step_runs=(runs,) * len(counts),
            binary=not bool(self.real),
            step_rates=tuple((counts.flatten(1).sum(1) / (self.rows * positions)).tolist()),
            step_effective=tuple((effective / images).tolist()),
            dense=float(dense.sum()) * channels * runs * len(counts),
        )


def _ones(x: Tensor) -> tuple[Tensor, Tensor]:
    """1 where x is not 0, else 0; and the largest distance of a magnitude from that, 0 if all values are 0, 1 or -1."""
    ones = x.sign().abs_()
    return ones, x.abs().sub_(ones).abs_().amax()


def _reach(shape: torch.Size, layer: Layer) -> Tensor:
    """Number of products that each value of an operand takes part in, padding excluded: ``(1, ...)``."""
    if isinstance(layer, nn.Linear):
        return torch.full((1, *shape[1:]), layer.out_features, dtype=torch.float64)
    taps = torch.full((1, 1, *layer.kernel_size), layer.out_channels // layer.groups, dtype=torch.float32)
    return _products(torch.Size((1, *shape[1:])), taps, layer, groups=1)


def _masked_reach(shape: torch.Size, mask: Tensor, layer: Layer) -> Tensor:
    """As `_reach`, counting products with the weights of a mask only: ``(C, ...)``."""
    if isinstance(layer, nn.Linear):
        return mask.double().sum(0).expand(shape)
    # The outputs of a group are summed, so one output channel with the number of weights per tap stands for all.
    taps = mask.unflatten(0, (layer.groups, -1)).sum(1, dtype=torch.float32)  # counts below 2**24: exact
    return _products(shape, taps, layer, layer.groups)


def _products(shape: torch.Size, taps: Tensor, layer: Any, groups: int) -> Tensor:
    """Derivative of the sum of a convolution's outputs with respect to an operand of this shape, in float64."""
    padding = layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else None
    amount: Any = 0 if padding is not None else layer.padding
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, *shape, requires_grad=True)
        # Values of the padding are 0 in every mode that the counted networks use: padded zeros add nothing.
        padded = x if padding is None else F.pad(x, padding)
        convolve = _CONVOLVE[len(layer.kernel_size)]
        outputs = convolve(padded, taps, None, layer.stride, amount, layer.dilation, groups)
        (products,) = torch.autograd.grad(outputs.sum(), x)
    return products[0].double()
