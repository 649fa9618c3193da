"""Convolutions whose weight gradients can run on a second stream, and of spikes that can keep their bits alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import weight_gradients
from .checks import check_num_steps, fixed_num_steps, has_hooks

__all__ = ["Conv2d", "SpikeConv2d", "shortcut_operands"]


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
    """A convolution of time-folded spikes without bias, which can keep their bits alone for its backward pass.

    Everything else, parameters and state_dict too, is ``nn.Conv2d``'s.

    Shape:
        - ``(T*B, C, H, W)`` -> ``(T*B, C', H', W')``

    Args:
        in_chs: Number of channels C.
        out_chs: Number of channels C'.
        kernel_size: Of the kernel.
        stride: Of the kernel.
        padding: On both sides.
        num_steps: Number of time steps T folded into the first axis.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    num_steps = fixed_num_steps()

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        num_steps: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chs, out_chs, kernel_size, stride, padding, bias=False, device=device, dtype=dtype)
        self.num_steps = check_num_steps(num_steps)

    def forward(self, x: Tensor, bits: Tensor | None = None) -> Tensor:
        """The convolution of x; with ``bits``, which `pack_spikes` makes of x, x itself is not kept."""
        if self.cast_weight is not None:
            return self._overlapped(x, bits, self.num_steps)
        if bits is not None:
            return self._packed(x, bits)
        return self._conv_forward(x, self.weight, self.bias)

    def _packed(self, x: Tensor, bits: Tensor) -> Tensor:
        if self.bias is not None:
            raise ValueError("expected a convolution without bias for packed spikes, got one: do without the bits")
        weight, device = self.weight, x.device.type
        if torch.is_autocast_enabled(device):  # as autocast does for conv2d, of which this op is none
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
        geometry = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        return torch.ops.gac_kernels.packed_conv2d(x, bits, weight, self.num_steps, *geometry)


def shortcut_operands(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """What a 1x1 shortcut multiplies, for the kernel that takes it along: x and weight, in the dtype it computes in.

    None where the module has to be called: something watches it, or it is another convolution.
    """
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1 and conv.bias is None
    if not plain or conv.stride not in ((1, 1), (2, 2)) or has_hooks(conv):
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    return x.to(dtype), conv.weight.to(dtype)
