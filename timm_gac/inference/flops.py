"""Formulas by which ``torch.utils.flop_counter`` counts the convolutions that have a neuron behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

import gac_kernels  # noqa: F401 (defines the operators)

Shape = Sequence[int]


def _convolution(place: int, x: Shape, weight: Shape, *args: Any, shortcut: Shape | None = None, **kwargs: Any) -> int:
    """Multiplications and additions, as PyTorch counts a convolution's, with those of a 1x1 shortcut; no neurons.

    Args:
        place: Of the shortcut among ``args``, which the dispatcher leaves out where it has its default value.
        x: Shape of the input.
        weight: Shape of the weight.
        args: The operator's further arguments.
        shortcut: Shape of the shortcut's weight where it is given by name.
        kwargs: ``out_shape`` among others.
    """
    shortcut = args[place] if len(args) > place else shortcut
    products = prod(weight[1:]) + (prod(shortcut[1:]) if shortcut is not None else 0)
    return 2 * prod(kwargs["out_shape"][0]) * products


for _op, _place in ((torch.ops.gac_kernels.conv_lif, 8), (torch.ops.gac_kernels.spike_conv, 10)):
    if _op not in flop_registry:
        register_flop_formula(_op)(partial(_convolution, _place))
