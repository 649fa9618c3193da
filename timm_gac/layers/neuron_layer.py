"""What the tools of this package ask of a layer of neurons."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gac_kernels import LIFSpec


@runtime_checkable
class NeuronLayer(Protocol):
    """A module with leaky integrate-and-fire neurons, which every tool sees: recorder, energy, inspection, early exit.

    It is a protocol and no base class: a neuron of one's own needs these members and nothing of this package, and the
    classes here keep the bases that they have for other reasons (`BatchNormLIF` is a batch norm, the encoder an
    encoder). ``isinstance(module, NeuronLayer)`` asks whether all members are there.

    Examples:
        >>> import torch
        >>> from timm_gac import CIFAR, LIF
        >>> isinstance(LIF(CIFAR), NeuronLayer), isinstance(torch.nn.ReLU(), NeuronLayer)
        (True, False)
    """

    @property
    def spec(self) -> LIFSpec:
        """What its neurons compute."""

    @property
    def returns_pair(self) -> bool:
        """Whether `forward` returns the pair (membrane, spikes), else spikes alone."""

    @property
    def spikes_dtype(self) -> torch.dtype | None:
        """Dtype of its spikes; None for that of its input."""

    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """What its neurons integrate in eval mode, ``(T, B, C, H, W)`` in at least float32.

        Args:
            inputs: What `forward` was called with, as a forward hook sees it.
            num_steps: T of these inputs, which can differ from the layer's own: early exit runs single steps.
        """

    def output_spikes(self, output: Any) -> Tensor:
        """The spikes in what `forward` returned, time-folded ``(T*B, C, H, W)``."""


def spikes_of(output: Any) -> Tensor:
    """The spikes of an output that is either spikes or the pair (membrane, spikes)."""
    spikes: Tensor = output[-1] if isinstance(output, tuple) else output
    return spikes


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_residual(current: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """A current plus the residual, which is the second of a layer's inputs where there is one."""
    return current if len(inputs) < 2 or inputs[1] is None else current + inputs[1].to(current.dtype)
