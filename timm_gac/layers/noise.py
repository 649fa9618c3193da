"""Gaussian noise on the input current of neurons, in training only: see `SpikingResNet.set_current_noise`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adds_noise(neuron: Any) -> bool:
    """Whether a layer of neurons adds noise to its input current now: it is in training and was told to."""
    return getattr(neuron, "current_noise", 0.0) > 0.0 and bool(neuron.training)


def draw_noise(neuron: Any, like: Tensor, axis: int) -> Tensor:
    """Noise of ``neuron.current_noise`` times its threshold, independent in every element.

    It comes from the device's default generator: dropout does too, so recomputed blocks draw the same again, a CUDA
    graph draws anew at each replay, and a checkpoint holds its state.

    Args:
        neuron: `LIF` or `GatedAttentionCoding`. A learned threshold counts as it is now, and gets no gradient from the
            noise, which it would else lower to have less of.
        like: Its shape, dtype, device and memory format.
        axis: Of the channels, for thresholds that differ by channel.
    """
    noise, share = torch.empty_like(like), float(neuron.current_noise)
    learned = neuron.learned
    if learned is None:
        return noise.normal_(std=share * neuron.spec.threshold)
    scale = (share * learned.threshold.detach()).to(noise.dtype)
    return noise.normal_().mul_(scale.view(-1, *[1] * (like.ndim - axis - 1)))
