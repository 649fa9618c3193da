"""Spikes as bits, the convolution that keeps them so, counts and rates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .neuron import steps_of


def pack_spikes_reference(spikes: Tensor, num_steps: int) -> Tensor:
    """Spikes of T steps as bits, eight steps a byte.

    Args:
        spikes: (T*B, ...), 0 or not; row ``t * B + b`` is sample b at step t.
        num_steps: T.

    Returns:
        (ceil(T/8)*B, ...) uint8; bit ``t % 8`` of frame ``t // 8`` is step t.
    """
    frames = steps_of(spikes.detach() != 0, num_steps).to(torch.uint8)
    groups = [torch.stack([step << k for k, step in enumerate(group)]).sum(0) for group in frames.split(8)]
    return torch.stack(groups).flatten(0, 1).to(torch.uint8)


def unpack_spikes_reference(bits: Tensor, num_steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The spikes of which `pack_spikes_reference` made ``bits``.

    Args:
        bits: (ceil(T/8)*B, ...) uint8.
        num_steps: T.
        dtype: Of the spikes.

    Returns:
        (T*B, ...), 0 or 1.
    """
    groups = steps_of(bits, -(-num_steps // 8))
    return torch.stack([(groups[t // 8] >> (t % 8)) & 1 for t in range(num_steps)]).flatten(0, 1).to(dtype)


def packed_conv2d_reference(
    spikes: Tensor,
    bits: Tensor,
    weight: Tensor,
    num_steps: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The convolution itself, which keeps the spikes.

    Args:
        spikes: (T*B, C, H, W), 0 or 1.
        bits: Those of the spikes; not used.
        weight: (C', C / groups, kH, kW) in the spikes' dtype.
        num_steps: T; not used.
        stride: As for ``conv2d``, like those that follow.
        padding: On both sides of each axis.
        dilation: Of the kernel.
        groups: Of the channels.

    Returns:
        (T*B, C', H', W').
    """
    return F.conv2d(spikes, weight, None, stride, padding, dilation, groups)


def count_spikes_reference(x: Tensor, num_steps: int, total: Tensor, real: Tensor) -> None:
    """Add to ``total`` how many samples have a value other than 0 at each step and place.

    Args:
        x: (T*B, ...), row ``t * B + b`` being sample b at step t.
        num_steps: T.
        total: (T, ...), added to in place.
        real: One bool, set in place where a value of x is none of 0, 1 and -1.
    """
    total += (steps_of(x, num_steps) != 0).sum(1)
    real |= ((x != 0) & (x.abs() != 1)).any()


def firing_rate_reference(x: Tensor, num_steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of time-folded spikes over time.

    Args:
        x: (T*B, ...), row ``t * B + b`` being sample b at step t; a floating dtype or int8.
        num_steps: T.
        dtype: Of the result; x's if None, float32 for int8.

    Returns:
        (B, ...).
    """
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    return steps_of(x.to(torch.promote_types(dtype, torch.float32)), num_steps).mean(0).to(dtype)
