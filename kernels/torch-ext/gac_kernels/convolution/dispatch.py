"""Which implementation of `spike_conv` runs where, why, and with which launch parameters."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import requested_backend, resolve_backend
from ..checks import conv3x3_shape
from ..common.triton import INTERPRETED
from ..tuning import shape_config
from . import onednn

_logger = logging.getLogger(__name__)
# Triton's oldest GPUs with tensor cores for int8 that it compiles for.
_FIRST_CAPABILITY = (8, 0)


class Shape(NamedTuple):
    """What launch parameters of a spike convolution depend on.

    Attributes:
        channels: Channels of the input.
        out_channels: Channels of the output.
        height: Rows of an output frame.
        width: Columns of an output frame.
        stride: 1 or 2.
        residual: Whether there is one.
        shortcut: Whether it is convolved first.
    """

    channels: int
    out_channels: int
    height: int
    width: int
    stride: int
    residual: bool
    shortcut: bool = False

    @classmethod
    def of(cls, spikes: Tensor, weight: Tensor, stride: int, residual: bool, shortcut: bool) -> Shape:
        """The shape of a call."""
        _, out_channels, height, width = conv3x3_shape(spikes, weight, stride)
        return cls(spikes.shape[1], out_channels, height, width, stride, residual, shortcut)

    def keys(self) -> tuple[str, ...]:
        """Its names in the launch parameters' JSON files, from the general to the particular."""
        name = f"{self.channels}-{self.out_channels}" + (":s2" if self.stride == 2 else "")
        size = f"@{self.height}x{self.width}"
        sizes = [name, f"{name}{size}"]
        kinds = ["", "+res", "+res+side"][: 1 + self.residual + self.shortcut]
        return tuple(n + kind for kind in kinds for n in sizes)


def spike_conv_config(kernel: str, shape: Shape, device: torch.device) -> dict[str, int]:
    """Launch parameters.

    Args:
        kernel: ``spike_conv``: BLOCK_M (pixels), BLOCK_N, BLOCK_K (channels out and in), num_warps and num_stages; or
            ``spike_conv_hopper``: COPIES (copies of pixels in flight of each of a program's two tiles, 2 or more; 0 for
            programs with one tile) and STEPS (time steps that share a copy of weights, 1 or 2); or
            ``conv_lif_hopper``: the same, and ONE_PASS, whether that is faster than cuDNN's convolution and `norm_lif`.
        shape: Of the call.
        device: Where it will run.
    """
    return shape_config(kernel, shape.keys(), device)


def spike_conv_backend(device: torch.device) -> str:
    """The implementation that a call runs: ``triton``, ``onednn`` or ``eager``; why it is the slowest is logged once.

    Raises:
        ValueError: A backend was asked for that cannot run on this device.
    """
    if resolve_backend(device, torch.int8) == "eager":
        if requested_backend() == "eager":
            return "eager"
        reason = onednn.why_not() if device.type == "cpu" else f"no Triton for {device.type}"
        if not reason:
            return "onednn"
        _say(f"spike_conv runs as exact float32 convolutions, slower: {reason}")
        return "eager"
    if device.type == "cpu" and INTERPRETED:
        return "triton"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _FIRST_CAPABILITY:
        if requested_backend() == "triton":
            raise ValueError(f"expected compute capability >= 8.0 for int8 in Triton, got {capability}: use 'auto'")
        _say(f"spike_conv runs as exact float32 convolutions: compute capability {capability} is below 8.0, slower")
        return "eager"
    return "triton"


@functools.cache
def _say(message: str) -> None:
    _logger.warning("%s", message)
