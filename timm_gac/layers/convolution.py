"""Convolutions whose weight gradients can run on a second stream, and of spikes that can keep their bits alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import weight_gradients
from .checks import check_num_steps, fixed_num_steps, log_called, may_skip


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight gradient can be computed on a second stream: see `weight_gradients`."""

    cast_weight: Any = None  # set by `weight_gradients.with_cast_weights` for the time of a forward pass

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
        if self.cast_weight is not None:
            return self._overlapped(x, None, 1)
        return self._conv_forward(x, self.weight, self.bias)

    def _overlapped(self, x: Tensor, bits: Tensor | None, num_steps: int) -> Tensor:
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        return weight_gradients.convolve(x, self.cast_weight, bits, num_steps, geometry)


class SpikeConv2d(Conv2d):
    """A convolution of time-folded spikes, which can keep their bits alone for its backward pass, or train in 8 bits.

    Everything else, arguments, parameters and state_dict too, is ``nn.Conv2d``'s, but there is no bias by default.

    Shape:
        - ``(T*B, C, H, W)`` -> ``(T*B, C', H', W')``

    Args:
        args: Those of ``nn.Conv2d``.
        num_steps: Number of time steps T folded into the first axis.
        bias: Add a bias; spikes are then not kept as bits.
        kwargs: Those of ``nn.Conv2d``.
    """

    int8 = False  # compute with int8 weights and fp8 gradients, see SpikingResNet.set_int8_convs
    num_steps = fixed_num_steps()

    def __init__(self, *args: Any, num_steps: int = 4, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, bias=bias)  # type: ignore[misc]
        self.num_steps = check_num_steps(num_steps)

    def forward(self, x: Tensor, bits: Tensor | None = None) -> Tensor:
        """The convolution of x; with ``bits``, which `pack_spikes` makes of x, x itself is not kept."""
        if self.int8:
            return self._in_8_bits(x, bits)
        if self.cast_weight is not None:
            return self._overlapped(x, bits, self.num_steps)
        if bits is not None:
            return self._packed(x, bits)
        return self._conv_forward(x, self.weight, self.bias)

    def _in_8_bits(self, x: Tensor, bits: Tensor | None) -> Tensor:
        x = x.to(autocast_dtype(x))
        return torch.ops.gac_kernels.int8_conv2d(x, self.weight, self.stride[0], bits, self.num_steps)

    def _packed(self, x: Tensor, bits: Tensor) -> Tensor:
        if self.bias is not None:
            raise ValueError("expected a convolution without bias for packed spikes, got one: do without the bits")
        x, weight = x.to(autocast_dtype(x)), self.weight.to(autocast_dtype(self.weight))
        geometry = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        return torch.ops.gac_kernels.packed_conv2d(x, bits, weight, self.num_steps, *geometry)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What ``conv2d`` would compute in for an operand x, for ops that autocast does not know; float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


_FORWARDS = (nn.Conv2d.forward, Conv2d.forward)
_SPIKE_FORWARDS = (SpikeConv2d.forward,)


def convolve(conv: nn.Module, x: Tensor, bits: Tensor | None) -> Tensor:
    """The convolution of spikes x, which keeps their ``bits`` instead of x if it can."""
    if bits is None or not isinstance(conv, SpikeConv2d) or type(conv).forward not in _SPIKE_FORWARDS:
        return conv(x)
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return conv(x)
    return conv(x, bits)


def is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Whether a convolution is what the kernels compute: 3x3 with padding 1 and stride 1 or 2, in one group."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
    )


def shortcut_operands(
    conv: nn.Module, x: Tensor, forwards: tuple[Any, ...] = _FORWARDS
) -> tuple[Tensor, Tensor] | None:
    """What a 1x1 shortcut multiplies, for the kernel that takes it along: x and weight, in the dtype it computes in.

    None where the module has to be called: something watches it, or it is another convolution than one of ``forwards``.
    """
    if not may_skip(conv, forwards):
        log_called(conv, forwards)
        return None
    assert isinstance(conv, nn.Conv2d)
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1 and conv.bias is None
    if not plain or conv.stride not in ((1, 1), (2, 2)):
        return None
    dtype = autocast_dtype(conv.weight)
    return x.to(dtype), conv.weight.to(dtype)
