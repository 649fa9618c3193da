"""The published networks, step by step: a plain peer of the fast ones and the layout of the published checkpoints.

Nothing here is hoisted, fused or vectorised over time. The image is repeated before the stem, the encoder attends to
every frame, neurons walk through time in a Python loop, and tensors are batch-major: (B, T, C, H, W). It runs in any
dtype. Its ``state_dict()`` has the names, shapes and shared tensors of the published code's checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels.spec import CIFAR, IMAGENET, LIFSpec

# name: neuron, then blocks, widths and strides of the stages
NETWORKS: dict[str, tuple[LIFSpec, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "msresnet18_cifar": (CIFAR, (3, 3, 2), (128, 256, 512), (1, 2, 2)),
    "msresnet18": (IMAGENET, (2, 2, 2, 2), (64, 128, 256, 512), (2, 2, 2, 2)),
    "msresnet34": (IMAGENET, (3, 4, 6, 3), (64, 128, 256, 512), (2, 2, 2, 2)),
}


class Spike(torch.autograd.Function):
    """Heaviside step at the threshold, with the dialect's surrogate derivative in the backward pass."""

    @staticmethod
    def forward(ctx: Any, membrane: Tensor, spec: LIFSpec) -> Tensor:
        """Spikes, 0 or 1, in the membrane's shape and dtype."""
        ctx.spec = spec
        ctx.save_for_backward(membrane)
        return (membrane > spec.threshold).to(membrane.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gradient of the membrane; the spec has none."""
        (membrane,), width = ctx.saved_tensors, ctx.spec.width
        distance = (membrane - ctx.spec.threshold).abs()
        if ctx.spec.surrogate == "triangle":
            slope = (width - distance).clamp(min=0) / width**2
        else:
            slope = (distance < width).to(membrane.dtype) / (2 * width)
        return grads[0] * slope, None


def fire(x: Tensor, spec: LIFSpec) -> Tensor:
    """Multi-step LIF with hard reset, one step after the other: x (B, T, ...) → spikes (B, T, ...)."""
    membrane = torch.zeros_like(x[:, 0])
    spikes = []
    for current in x.unbind(1):
        membrane = spec.decay * membrane + current
        spike = Spike.apply(membrane, spec)
        membrane = (1 - (spike.detach() if spec.detach_reset else spike)) * membrane
        spikes.append(spike)
    return torch.stack(spikes, dim=1)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer of images to all B·T frames at once: (B, T, C, H, W) → (B, T, C', H', W')."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FrameNorm(nn.Module):
    """Batch norm over all frames together; the CIFAR code registers it under a second name."""

    def __init__(self, width: int, aliased: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        if aliased:
            self.seqbn = nn.ModuleDict({"module": self.bn})

    def forward(self, x: Tensor) -> Tensor:
        """Normalised frames: (B·T, C, H, W) → (B·T, C, H, W)."""
        return self.bn(x)


def alias(layer: nn.Module, norm: nn.Module | None = None) -> nn.ModuleDict:
    """The second name under which the published code holds a layer and its norm: ``layer.module``, ``bn``."""
    held = nn.ModuleDict({"layer": nn.ModuleDict({"module": layer})})
    if norm is not None:
        held["bn"] = norm
    return held


class Encoding(nn.Module):
    """Gated attention coding on every frame: (B, T, C, H, W) → (B, T, C, H, W), values in [0, 1)."""

    def __init__(self, num_steps: int, width: int, spec: LIFSpec) -> None:
        super().__init__()
        hidden = max(1, num_steps // 2)
        self.spec = spec
        temporal = [nn.Conv3d(num_steps, hidden, 1, bias=False), nn.Conv3d(hidden, num_steps, 1, bias=False)]
        spatial = [nn.Conv2d(width, width, 4, padding="same", bias=False) for _ in range(2)]
        self.TA = nn.ModuleDict({"sharedMLP": nn.Sequential(temporal[0], nn.ReLU(), temporal[1])})
        self.SCA = nn.ModuleDict({"sharedMLP": nn.Sequential(spatial[0], nn.ReLU(), spatial[1])})

    def forward(self, x: Tensor) -> Tensor:
        """Gated spikes of the frames."""
        average = x.mean((2, 3, 4), keepdim=True)  # [B, T, 1, 1, 1]
        # Not amax, whose gradient can be NaN under Inductor: see timm_gac/bench/baselines.py.
        peak = x.flatten(2).max(2).values[..., None, None, None]
        temporal = self.TA["sharedMLP"](average) + self.TA["sharedMLP"](peak)
        return torch.sigmoid(temporal * per_frame(self.SCA["sharedMLP"], x)) * fire(x, self.spec)


class Block(nn.Module):
    """Membrane-shortcut block: (B, T, C, H, W) → (B, T, C', H', W')."""

    def __init__(self, in_width: int, width: int, stride: int, spec: LIFSpec, aliased: bool) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = FrameNorm(width, aliased)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = FrameNorm(width, aliased)
        self.projection: list[str] = []  # names of the layers on the shortcut, in order
        if stride != 1 or in_width != width:
            conv, norm = nn.Conv2d(in_width, width, kernel_size=1, stride=stride, bias=False), FrameNorm(width, aliased)
            if aliased:
                self.downsample = alias(conv, norm)
                self.projection = ["downsample.layer.module", "downsample.bn"]
            else:
                self.shortcut = nn.Sequential(conv, norm)
                self.projection = ["shortcut.0", "shortcut.1"]
        if aliased:
            self.conv1_s = alias(self.conv1, self.bn1)
            self.conv2_s = alias(self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        """Membrane potentials of the block's output."""
        y = per_frame(self.bn1, per_frame(self.conv1, fire(x, self.spec)))
        y = per_frame(self.bn2, per_frame(self.conv2, fire(y, self.spec)))
        for name in self.projection:
            x = per_frame(self.get_submodule(name), x)
        return x + y


class PublishedNet(nn.Module):
    """A published network: (B, C, H, W) image, or (B, T, C, H, W) frames, → (B, num_classes) logits.

    Args:
        name: ``msresnet18_cifar``, ``msresnet18`` or ``msresnet34`` for direct coding, with ``gac_`` in front for
            gated attention coding.
        num_classes: Classes of the linear head.
        num_steps: Time steps T; an image is repeated T times.
        in_chans: Channels of the input.

    Raises:
        ValueError: The name is not one of these.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """

    def __init__(self, name: str, num_classes: int = 10, num_steps: int = 4, in_chans: int = 3) -> None:
        super().__init__()
        base = name.removeprefix("gac_")
        if base not in NETWORKS:
            raise ValueError(f"expected one of {list(NETWORKS)} or its gac_ twin, got {name!r}: choose one of these")
        self.spec, depths, widths, strides = NETWORKS[base]
        self.num_steps = num_steps
        cifar, width = self.spec == CIFAR, 64
        if cifar:
            self.conv1: nn.Module = nn.Conv2d(in_chans, width, kernel_size=3, padding=1, bias=False)
            self.bn1: nn.Module = FrameNorm(width, aliased=True)
            self.conv1_s = alias(self.conv1, self.bn1)
        else:
            stem_conv = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.conv1 = nn.Sequential(stem_conv, FrameNorm(width, aliased=False))
            self.bn1 = nn.Identity()
        self.encoding = nn.Identity() if name == base else Encoding(num_steps, width, self.spec)
        self.stages: list[str] = []  # names of the stages, in order
        for index, (depth, stage_width, stride) in enumerate(zip(depths, widths, strides, strict=True), 1):
            blocks = []
            for block in range(depth):
                blocks.append(Block(width, stage_width, stride if block == 0 else 1, self.spec, cifar))
                width = stage_width
            self.stages.append(f"layer{index}" if cifar else f"conv{index + 1}_x")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.fc1 = nn.Linear(width, num_classes)
        self.fc1_s = alias(self.fc1)
        if not cifar:
            self._initialise()

    def _initialise(self) -> None:
        """ImageNet recipe: kaiming fan-out, BN weight θ, and 0 for the last BN of each residual branch."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, self.spec.threshold)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.bn2.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, averaged over time: (B, C, H, W) or (B, T, C, H, W) → (B, num_classes)."""
        frames = x.unsqueeze(1).repeat(1, self.num_steps, 1, 1, 1) if x.ndim == 4 else x
        y = self.encoding(per_frame(self.bn1, per_frame(self.conv1, frames)))
        for stage in self.stages:
            y = self.get_submodule(stage)(y)
        rates = fire(y, self.spec).mean((-2, -1))  # [B, T, C]
        return self.fc1(rates).mean(1)
