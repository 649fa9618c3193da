"""Floating-point convolutions that do not round: float32 holds each of their sums, whatever its order.

Sums of integers in another order are equal. Sums of real numbers mostly are not, and libraries, memory formats and
batch sizes differ in the order. So inputs and weights are integers here, times a power of two each, of so few bits that
no sum leaves the 24 which float32 has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels.reference import on_grid

from ..layers.convolution import autocast_dtype, shortcut_operands

LEVELS = 2**10  # the largest input, in steps
_SUMS = 2**24  # up to which float32 holds all integers
_WEIGHTS = 2**11  # the largest weight, in units: TF32 and float16 hold all integers up to it, and so all inputs


def input_step(limit: float) -> float:
    """The power of two of which inputs up to ``limit`` are at most `LEVELS`."""
    return 2.0 ** (math.ceil(math.log2(limit)) - int(math.log2(LEVELS)))


def weight_units(weight: Tensor, bias: Tensor | None, step: float, rounding: float = 0.0) -> Tensor:
    """The finest powers of two of which the weights of each output channel may be multiples, so that no sum rounds.

    A sum of some of the products and the bias, in any order, is a multiple of ``unit * step``, and at most
    ``LEVELS * sum(|weight|) / unit + |bias| / (unit * step)`` times that: at most 2**24, which float32 holds.

    Args:
        weight: (C', C, K, K) float64.
        bias: (C',) float64, to be a multiple of ``unit * step``; None for none.
        step: What inputs are multiples of, at most `LEVELS` times; 0 for spikes, which are 0 or 1.
        rounding: By how many units each weight, and the bias, may still grow.

    Returns:
        (C',) float64.

    Raises:
        ValueError: A channel has too many weights.
    """
    levels, step = (LEVELS, step) if step else (1, 1.0)
    room = _SUMS - rounding * (levels * weight[0].numel() + 1)
    if room <= 0:
        raise ValueError(
            f"expected at most {_SUMS // levels:,} weights a channel, got {weight[0].numel():,}: float32 does not hold "
            "their sums, so the network cannot be quantised"
        )
    sums = weight.abs().sum((1, 2, 3)) * levels
    if bias is not None:
        sums = sums + bias.abs() / step
    least = torch.maximum(sums / room, weight.abs().amax((1, 2, 3)) / _WEIGHTS)
    return torch.exp2(least.clamp(min=2.0**-60).log2().ceil())


class ExactConv2d(nn.Conv2d):
    """A convolution of real numbers whose sums float32 and float64 hold exactly, so that every order gives the same.

    Inputs are rounded to the nearest multiple of a power of two, ties to even, and to at most `LEVELS` times that, and
    weights are multiples of a power of two too, one an output channel (`weight_units`). In 16 bits, autocast too, it is
    a plain convolution, which rounds.

    Shape:
        - ``(N, C, H, W)`` -> ``(N, C', H', W')``

    Attributes:
        log2_step: Exponent of the power of two of which inputs become multiples, () int64; None where they are taken
            as they are, such as spikes.

    Args:
        conv: Whose geometry and weights it takes over.
        step: The power of two; 0 to take inputs as they are.
        bias: (C',), None for none.
        exact: Round weights and bias. Without it the layer is a plain convolution.
    """

    log2_step: Tensor | None

    def __init__(self, conv: nn.Conv2d, step: float = 0.0, bias: Tensor | None = None, exact: bool = True) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            kernel_size=conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=torch.float64,
        )
        self.exact, self.step = exact, step if exact else 0.0
        exponent = torch.tensor(round(math.log2(self.step))) if self.step else None
        self.register_buffer("log2_step", exponent)
        weight = conv.weight.detach().double()
        if exact:
            units = weight_units(weight, bias, self.step, rounding=0.5)
            weight = _multiples(weight, units[:, None, None, None])
            bias = None if bias is None else _multiples(bias, units * (self.step or 1.0))
        self.weight.data.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    def check_exact(self, name: str) -> None:
        """Raise a ValueError unless no sum can round: for weights from a file, in float32 or float64."""
        if not self.exact:
            return
        weight, bias = self.weight.double(), None if self.bias is None else self.bias.double()
        units = weight_units(weight, bias, self.step)
        off = weight.remainder(units[:, None, None, None]).any()
        if bias is not None:
            off |= bias.remainder(units * (self.step or 1.0)).any()
        if off:
            raise ValueError(
                f"expected {name} with weights of which float32 holds every sum, got others: quantise anew"
            )

    def _rounded(self, x: Tensor) -> Tensor:
        """What is multiplied: x in steps and, for a 1x1 convolution, without the pixels that its stride leaves out."""
        if not self.step or x.dtype.itemsize < 4:
            return x
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        limit = LEVELS * self.step
        return on_grid(x.clamp(-limit, limit), self.step)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `shortcut_operands`."""
        operands = shortcut_operands(self, x, (ExactConv2d.forward,))
        return None if operands is None else (self._rounded(operands[0]), operands[1])

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
        given = x if autocast_dtype(x).itemsize < 4 else self._rounded(x)
        if given.shape != x.shape:  # its stride is done
            return F.conv2d(given, self.weight, self.bias, groups=self.groups)
        return self._conv_forward(given, self.weight, self.bias)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.log2_step is not None:
            self.step = 2.0 ** int(self.log2_step)

    def extra_repr(self) -> str:
        """Sizes and step."""
        return f"{super().extra_repr()}, step={self.step}"


def _multiples(x: Tensor, units: Tensor) -> Tensor:
    return (x / units).round() * units
