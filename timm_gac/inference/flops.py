"""Formulas by which ``torch.utils.flop_counter`` counts the convolutions that have a neuron behind them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

import gac_kernels  # noqa: F401 (defines the operators)

Shape = Sequence[int]


def _conv_lif(x: Shape, weight: Shape, *args: Any, shortcut: Shape | None = None, **kwargs: Any) -> int:
    return _convolution(weight, args[8] if len(args) > 8 else shortcut, kwargs["out_shape"][0])


def _spike_conv(x: Shape, weight: Shape, *args: Any, shortcut: Shape | None = None, **kwargs: Any) -> int:
    return _convolution(weight, args[10] if len(args) > 10 else shortcut, kwargs["out_shape"][0])


def _convolution(weight: Shape, shortcut: Shape | None, output: Shape) -> int:
    """Multiplications and additions, as PyTorch counts a convolution's, with those of a 1x1 shortcut; no neurons."""
    return 2 * prod(output) * (prod(weight[1:]) + (prod(shortcut[1:]) if shortcut is not None else 0))


for _op, _formula in (("conv_lif", _conv_lif), ("spike_conv", _spike_conv)):
    if getattr(torch.ops.gac_kernels, _op) not in flop_registry:
        register_flop_formula(getattr(torch.ops.gac_kernels, _op))(_formula)
