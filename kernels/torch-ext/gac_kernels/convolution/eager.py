"""`spike_conv` in vectorised PyTorch, written into given outputs: exact on any device, only slower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..neuron.eager import lif_forward, shifted


def forward(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    shift: float,
    out: Tensor,
    membrane: Tensor,
) -> None:
    """Write spikes and, where it has elements, the neuron's input current."""
    # Integers below 2**24 are exact in float32, and so is their sum in any order. An algorithm that transforms its
    # input (Winograd, FFT) is off by far less than 1/2, which rounding mends.
    with torch.autocast(spikes.device.type, enabled=False):
        sums = F.conv2d(spikes.float(), weight.float(), None, stride, 1).round_()
    current = sums.mul_(scale[:, None, None]).add_(bias.sub(shift)[:, None, None])
    if residual is not None:
        current.add_(shifted(residual, shift))
    if membrane.numel():
        membrane.copy_(current)
    nothing = current.new_empty(0)
    steps, fired = current.unflatten(0, (num_steps, -1)), out.unflatten(0, (num_steps, -1))
    lif_forward(
        x=steps,
        state=None,
        spikes=fired,
        last=nothing,
        mask=nothing,
        threshold=threshold,
        decay=decay,
        width=1.0,
        soft_reset=soft_reset,
    )
