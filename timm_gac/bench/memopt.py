"""SpikingJelly's memory optimiser (``activation_based.memopt``) on the time-major baseline with its neuron.

Its first level is used: every half of a residual block is checkpointed, and a half whose input is all zeros and ones
keeps it as bits. The higher levels search by repeated training steps, for splits in space and time that these halves
do not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import STAGES
from ..models.network import SpikingResNet
from .baselines import Neuron, PlainBlock, SpikingJellyNeuron, TimeMajorNet

PROBE_SIZE = 32  # pixels of the images with which it finds binary inputs; their size does not matter for that


class FirstHalf(nn.Module):
    """Spikes to spikes: convolution, batch norm, neuron."""

    def __init__(self, block: PlainBlock) -> None:
        super().__init__()
        self.conv, self.bn, self.neuron, self.num_steps = block.conv1, block.bn1, block.neuron1, block.num_steps

    def forward(self, spikes: Tensor) -> Tensor:
        """Spikes ``(T*B, ...)`` of the block's first neuron."""
        return self.neuron(self.bn(self.conv(spikes)), self.num_steps)


class SecondHalf(nn.Module):
    """Spikes and shortcut to membrane and spikes: convolution, batch norm, addition, neuron."""

    def __init__(self, block: PlainBlock) -> None:
        super().__init__()
        self.conv, self.bn, self.neuron, self.num_steps = block.conv2, block.bn2, block.neuron2, block.num_steps

    def forward(self, hidden: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        """Membrane before the block's second neuron, and its spikes, ``(T*B, ...)`` each."""
        membrane = self.bn(self.conv(hidden)) + shortcut
        return membrane, self.neuron(membrane, self.num_steps)


class Shortcut(nn.Module):
    """Convolution and batch norm of a shortcut."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """The shortcut's tensor ``(T*B, ...)``."""
        return self.layers(x)


class HalvedBlock(nn.Module):
    """A `PlainBlock` in parts that can be checkpointed each; parameters have the same names.

    Args:
        block: Block whose layers it takes over.
    """

    def __init__(self, block: PlainBlock) -> None:
        super().__init__()
        self.membrane_shortcut = block.membrane_shortcut
        for name in ("conv1", "bn1", "conv2", "bn2", "downsample"):  # first here, so that parameters have these names
            self.add_module(name, getattr(block, name))
        self.first, self.second = FirstHalf(block), SecondHalf(block)
        self.shortcut = nn.Identity() if block.downsample is None else Shortcut(block.downsample)

    def forward(self, membrane: Tensor, spikes: Tensor) -> tuple[Tensor, Tensor]:
        """As `PlainBlock.forward`."""
        shortcut = self.shortcut(membrane if self.membrane_shortcut else spikes)
        membrane, spikes = self.second(self.first(spikes), shortcut)
        return (membrane if self.membrane_shortcut else spikes), spikes


def memory_optimized(model: SpikingResNet) -> nn.Module:
    """The time-major network on SpikingJelly's neuron, its memory optimised by SpikingJelly; same weights."""
    from spikingjelly.activation_based.memopt import optimize_memory

    neuron: Neuron = SpikingJellyNeuron(model.spec)
    network = TimeMajorNet(model, neuron)
    for blocks in (network.get_submodule(name) for name in STAGES if name in network.stages):
        for name, block in list(blocks.named_children()):
            setattr(blocks, name, HalvedBlock(block))  # type: ignore[arg-type]
    shape = (2, model.in_chans, PROBE_SIZE, PROBE_SIZE)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        images = torch.randn(shape)

        def example(module: nn.Module) -> Any:
            return module(images)

        network.train()
        targets = (FirstHalf, SecondHalf, Shortcut)
        optimized: nn.Module = optimize_memory(network, targets, example_forward=example, level=1)
    return optimized
