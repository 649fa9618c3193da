"""Time-major baselines of the model benchmark: a model of this package as plain PyTorch modules around any neuron.

Like this package's models they run channels-last and compute stem and attention once for a static image. So they differ
only in the work between the convolutions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import LIFSpec

from ..layers.encoder import GatedAttentionCoding
from ..models.blocks import STAGES, MSBlock
from ..models.network import SpikingResNet
from ..models.published import Spike
from .ops import spikingjelly_neuron, spikingjelly_parametric_neuron

Neuron = Callable[[Tensor, int], Tensor]  # time-folded (T*B, ...) and T -> spikes (T*B, ...)
# What a neuron learns, by the end of its name here or in this package's networks.
LEARNED = re.compile(r"(^|[ .])(neuron\d?\.w|learned\.(decay_logit|threshold_raw))$")


class LoopNeuron(nn.Module):
    """Multi-step LIF as an ordinary loop over time, with a float32 (or float64) membrane."""

    def __init__(self, spec: LIFSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, num_steps: int) -> Tensor:
        """Spikes of a folded input, ``(T*B, ...)``, in its dtype and memory format."""
        membrane: Tensor | float = 0.0
        spikes = []
        for current in x.chunk(num_steps):
            membrane = self.spec.decay * membrane + current.to(torch.promote_types(x.dtype, torch.float32))
            spike = Spike.apply(membrane, self.spec)
            membrane = (1 - (spike.detach() if self.spec.detach_reset else spike)) * membrane
            spikes.append(spike.to(x.dtype))
        return torch.cat(spikes)


class SpikingJellyNeuron(nn.Module):
    """SpikingJelly's functional multi-step LIF with a float32 state; its initial zeros are kept by shape."""

    def __init__(self, spec: LIFSpec) -> None:
        super().__init__()
        self.fire = spikingjelly_neuron(spec)
        self.zeros: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor, num_steps: int) -> Tensor:
        """Spikes of a folded input, ``(T*B, ...)``, in its dtype."""
        frames = x.unflatten(0, (num_steps, x.shape[0] // num_steps))
        shape = tuple(frames.shape[1:])
        if shape not in self.zeros:
            self.zeros[shape] = torch.zeros_like(frames[0], dtype=torch.float32, requires_grad=False)
        return self.fire_frames(frames, self.zeros[shape]).flatten(0, 1)

    def fire_frames(self, frames: Tensor, zeros: Tensor) -> Tensor:
        """Spikes of ``(T, B, ...)`` from this initial state."""
        return self.fire(frames, zeros)


class SpikingJellyPLIF(SpikingJellyNeuron):
    """SpikingJelly's parametric LIF: as `SpikingJellyNeuron`, but each layer learns its decay."""

    def __init__(self, spec: LIFSpec) -> None:
        super().__init__(spec)
        self.spec, self.fire = spec, spikingjelly_parametric_neuron(spec)
        self.w = nn.Parameter(torch.tensor(math.log((1 - spec.decay) / spec.decay)))

    def fire_frames(self, frames: Tensor, zeros: Tensor) -> Tensor:
        """Spikes of ``(T, B, ...)`` from this initial state."""
        return self.fire(frames, zeros, self.w)


def _own(neuron: Neuron) -> Neuron:
    """The neuron for one more layer: another one where it learns, else the same."""
    return SpikingJellyPLIF(neuron.spec) if isinstance(neuron, SpikingJellyPLIF) else neuron


class PlainEncoder(nn.Module):
    """Gated attention coding of a static image in plain PyTorch: ``(B, C, H, W)`` -> folded ``(T*B, C, H, W)``."""

    def __init__(self, channels: int, num_steps: int, neuron: Neuron) -> None:
        super().__init__()
        self.num_steps, self.neuron = num_steps, _own(neuron)
        hidden = max(1, num_steps // 2)
        fc1, fc2 = nn.Linear(num_steps, hidden, bias=False), nn.Linear(hidden, num_steps, bias=False)
        self.temporal = nn.ModuleDict({"fc1": fc1, "fc2": fc2})
        convolutions = {name: nn.Conv2d(channels, channels, 4, bias=False) for name in ("conv_a", "conv_b")}
        self.spatial = nn.ModuleDict(convolutions)

    def forward(self, stem: Tensor) -> Tensor:
        """Gated spikes."""
        wide = stem.to(torch.promote_types(stem.dtype, torch.float32))
        # Not amax: compiled by Inductor in bfloat16 its gradient was NaN (PyTorch 2.11 on a GPU, 2.14 on a CPU). It
        # goes to the elements that equal the maximum, over their number, which rounding probably made 0.
        pools = torch.stack([wide.mean((1, 2, 3)), wide.flatten(1).max(1).values])  # (2, B)
        pools = pools.unsqueeze(2).expand(-1, -1, self.num_steps).to(stem.dtype)
        temporal = self.temporal["fc2"](F.relu(self.temporal["fc1"](pools))).sum(0)  # (B, T)
        spatial = F.relu(self.spatial["conv_a"](F.pad(stem, [1, 2, 1, 2])))
        spatial = self.spatial["conv_b"](F.pad(spatial, [1, 2, 1, 2]))
        gate = torch.sigmoid(temporal.t()[:, :, None, None, None] * spatial).flatten(0, 1)
        spikes = self.neuron(torch.cat([stem] * self.num_steps), self.num_steps)
        return (gate * spikes).to(stem.dtype)


class PlainBlock(nn.Module):
    """A residual block on the folded pair (membrane, spikes), with the interface of this package's blocks."""

    def __init__(self, block: Any, num_steps: int, neuron: Neuron) -> None:
        super().__init__()
        self.num_steps, self.neuron1, self.neuron2 = num_steps, _own(neuron), _own(neuron)
        self.membrane_shortcut = isinstance(block, MSBlock)
        self.conv1, self.conv2 = like(block.conv1), like(block.conv2)
        self.bn1, self.bn2 = (nn.BatchNorm2d(conv.out_channels) for conv in (self.conv1, self.conv2))
        self.downsample: nn.Module | None = None
        if block.downsample is not None:
            conv = like(block.downsample[0])
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))

    def forward(self, membrane: Tensor, spikes: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (membrane, spikes); a plain spiking block returns its spikes twice."""
        shortcut = membrane if self.membrane_shortcut else spikes
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        hidden = self.neuron1(self.bn1(self.conv1(spikes)), self.num_steps)
        membrane = self.bn2(self.conv2(hidden)) + shortcut
        spikes = self.neuron2(membrane, self.num_steps)
        return (membrane if self.membrane_shortcut else spikes), spikes


class TimeMajorNet(nn.Module):
    """A model of this package as plain PyTorch modules around any neuron: images -> logits; same state_dict.

    Args:
        model: Model whose shape and weights it takes.
        neuron: Neuron of all layers; where it learns, each has one of its own, beside the model's weights.

    Raises:
        ValueError: The model has other parameters.
    """

    def __init__(self, model: SpikingResNet, neuron: Neuron) -> None:
        super().__init__()
        self.num_steps = model.num_steps
        self.conv1, self.bn1 = like(model.conv1), nn.BatchNorm2d(model.conv1.out_channels)
        gated = is_gated(model)
        self.encoder = PlainEncoder(self.conv1.out_channels, self.num_steps, neuron) if gated else None
        self.stages = [name for name in STAGES if len(getattr(model, name))]
        for name in self.stages:
            blocks = (PlainBlock(block, self.num_steps, neuron) for block in getattr(model, name))
            self.add_module(name, nn.ModuleList(blocks))
        self.fc = nn.Linear(model.fc.in_features, model.fc.out_features)
        starts_firing = self.stages and getattr(self, self.stages[0])[0].membrane_shortcut
        self.neuron = _own(neuron) if starts_firing else None
        found = self.load_state_dict(model.state_dict(), strict=False)
        others = [name for name in (*found.missing_keys, *found.unexpected_keys) if not LEARNED.search(name)]
        if others:
            raise ValueError(f"expected the parameters of a model with fixed neurons, got also or not {others}")

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's output, folded."""
        stem = self.bn1(self.conv1(x))
        return torch.cat([stem] * self.num_steps) if self.encoder is None else self.encoder(stem)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        membrane = spikes = self.encode(x)
        blocks = [block for name in self.stages for block in getattr(self, name)]
        if self.neuron is not None:
            spikes = self.neuron(membrane, self.num_steps)
        for block in blocks:
            membrane, spikes = block(membrane, spikes)
        return self.fc(spikes.unflatten(0, (self.num_steps, -1)).mean((0, 3, 4)))


def like(conv: Any) -> nn.Conv2d:
    """A new convolution of the same shape, without bias."""
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    return nn.Conv2d(*shape, bias=False)


def is_gated(model: SpikingResNet) -> bool:
    """Whether the model's encoder is gated attention coding."""
    return isinstance(model.encoder, GatedAttentionCoding)
