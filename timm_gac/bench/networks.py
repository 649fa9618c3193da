"""Networks of the model benchmark by name: this package's, baselines with the same weights, lower bounds."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gac_kernels import pad_frames

from ..hub import load_model
from ..inference.fold import fuse_for_inference
from ..inference.integer import IntegerSpikingResNet
from ..inference.quantize import quantize
from ..layers.learned import LearnedValues
from ..models.ann_resnet import ann_like
from ..models.blocks import STAGES
from ..models.checkpoint import canonical_name
from ..models.network import SpikingResNet
from ..models.published import NETWORKS as PUBLISHED
from ..models.published import PublishedNet
from .baselines import LoopNeuron, SpikingJellyNeuron, SpikingJellyPLIF, TimeMajorNet, is_gated, like
from .memopt import memory_optimized


class Unavailable(ValueError):  # noqa: N818 (not an error: the row's note has the reason)
    """A network cannot take part; the message is the reason."""


class _Tee(torch.autograd.Function):
    """Give x to two branches; its gradient is that of the first branch, not the sum of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Join(torch.autograd.Function):
    """The first of two branches, not their sum; both receive the gradient of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


class ConvolutionsOnly(nn.Module):
    """Only the convolutions and the classifier of a model, with the same shapes: a lower bound of its time.

    The initial weights keep the variance of activations, since a GPU's power, and so its clock, depends on the values.
    """

    def __init__(self, model: SpikingResNet) -> None:
        super().__init__()
        self.num_steps = model.num_steps
        self.stem = like(model.conv1)
        width = self.stem.out_channels
        gates = 2 if is_gated(model) else 0
        self.gates = nn.ModuleList(nn.Conv2d(width, width, 4, bias=False) for _ in range(gates))
        self.blocks: list[dict[str, nn.Conv2d]] = []
        for block in (block for name in STAGES for block in getattr(model, name)):
            layers = {"conv1": like(block.conv1), "conv2": like(block.conv2)}
            if block.downsample is not None:
                layers["side"] = like(block.downsample[0])
            self.blocks.append(layers)
        self.layers = nn.ModuleList(nn.ModuleDict(layers) for layers in self.blocks)  # registers them
        self.fc = nn.Linear(model.fc.in_features, model.fc.out_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of the logits' shape ``(B, num_classes)``."""
        x = self.stem(x)
        for gate in self.gates:
            x = gate(pad_frames(x, 1, 2))
        x = torch.cat([x] * self.num_steps)
        for block in self.blocks:
            if "side" in block:
                x, branch = _Tee.apply(x)
                x = _Join.apply(block["conv2"](block["conv1"](x)), block["side"](branch))
            else:
                x = block["conv2"](block["conv1"](x))
        return self.fc(x.unflatten(0, (self.num_steps, -1)).mean((0, 3, 4)))


def _ours(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    return copy.deepcopy(model)


def _packed(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    if mode != "train":
        raise Unavailable("packing spikes saves memory in the backward pass: only for training")
    network = copy.deepcopy(model)
    network.set_spike_packing(True)
    return network


def _in_8_bits(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    if mode != "train":
        raise Unavailable("training in 8 bits is no inference: timm_gac_int8 has the same integers")
    network = copy.deepcopy(model)
    network.set_int8_convs(True)
    return network


def _fused(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    if mode != "infer":
        raise Unavailable("batch norm is folded for inference only")
    return fuse_for_inference(copy.deepcopy(model).eval())


def _int8(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    if mode != "infer":
        raise Unavailable("integer networks are for inference only")
    stored = load_model(Path(name)) if Path(name).is_dir() else None
    return stored if isinstance(stored, IntegerSpikingResNet) else quantize(copy.deepcopy(model).eval())


def _loop(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    return TimeMajorNet(model, LoopNeuron(model.spec))


def _spikingjelly(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    _require_spikingjelly()
    return TimeMajorNet(model, SpikingJellyNeuron(model.spec))


def _learning(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    """The network with a learned decay and threshold a layer, which begin with the spec's."""
    _require_training(mode)
    if Path(name).is_dir():
        raise Unavailable("a model folder has the neurons that it was trained with: give a registered model")
    shape = {"num_classes": model.num_classes, "in_chans": model.in_chans, "num_steps": model.num_steps}
    network = timm.create_model(name, **shape, neuron="plif").to(model.conv1.weight)
    network.load_state_dict(model.state_dict())
    for module in network.modules():
        if isinstance(module, LearnedValues) and model.conv1.weight.dtype == torch.float64:
            module.set_values(torch.tensor(model.spec.decay), torch.tensor(model.spec.threshold))
    return network


def _spikingjelly_learning(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    _require_spikingjelly()
    _require_training(mode)
    return TimeMajorNet(model, SpikingJellyPLIF(model.spec)).to(model.conv1.weight)


def describe(network: str, *, compiled: bool) -> str:
    """What a row has to say about a network beside its name: how one that trains in 8 bits computes."""
    if network != "timm_gac_8bit":
        return ""
    how = "torch.compile runs int8_conv2d, without kernels of one byte" if compiled else "kernels of one byte"
    return f"int8 weights, float8 gradients: {how}"


def _require_training(mode: str) -> None:
    if mode != "train":
        raise Unavailable("decays are learned in training: for inference they are numbers as any others")


def _spikingjelly_memopt(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    _require_spikingjelly()
    if mode != "train":
        raise Unavailable("memopt saves memory in the backward pass: only for training")
    return memory_optimized(model)


def _require_spikingjelly() -> None:
    if importlib.util.find_spec("spikingjelly") is None:
        raise Unavailable("spikingjelly is not installed: pip install spikingjelly")


def _published(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    if name.removeprefix("gac_") not in PUBLISHED:
        raise Unavailable(f"the published algorithm has no {name}")
    network = PublishedNet(name, model.num_classes, model.num_steps, model.in_chans)
    weights = model.state_dict()
    with torch.no_grad():
        for key, value in network.state_dict(keep_vars=True).items():
            value.copy_(weights[canonical_name(key)].view_as(value))
    return network


def _ann(model: SpikingResNet, name: str, mode: str) -> nn.Module:
    try:
        return ann_like(model)
    except ValueError as error:
        raise Unavailable(f"timm's ResNet has no such shape: {error}") from error


# Name of a network to what builds it from (model, its registered name, mode); order of the default benchmark.
NETWORKS: dict[str, Callable[[SpikingResNet, str, str], nn.Module]] = {
    "timm_gac": _ours,
    "timm_gac_packed": _packed,
    "timm_gac_8bit": _in_8_bits,
    "timm_gac_plif": _learning,
    "timm_gac_fused": _fused,
    "timm_gac_int8": _int8,
    "convolutions": lambda model, name, mode: ConvolutionsOnly(model),
    "ann": _ann,
    "spikingjelly": _spikingjelly,
    "spikingjelly_memopt": _spikingjelly_memopt,
    "spikingjelly_plif": _spikingjelly_learning,
    "published": _published,
    "loop": _loop,
}

# What a launch that compiles adds to torch.compile's options. Inductor gives convolutions the layout it expects to be
# fastest; without that, the network's own stays.
COMPILERS: dict[str, dict[str, Any] | None] = {"compile": None, "compile_no_layout": {"layout_optimization": False}}

# How each is launched by default; the loop, slowest eagerly, is the baseline of the compiler.
LAUNCHES = {
    "timm_gac": ("", "+graph", "+compile"),
    "timm_gac_packed": ("", "+graph"),
    "timm_gac_8bit": ("", "+graph", "+compile"),
    "timm_gac_plif": ("", "+graph"),
    "timm_gac_fused": ("", "+graph"),
    "timm_gac_int8": ("", "+graph"),
    "convolutions": ("", "+graph"),
    "ann": ("", "+graph"),
    "spikingjelly": (
        *("", "+graph", "+compile", "+compile+graph"),
        *("+compile_no_layout", "+compile_no_layout+graph"),
    ),
    "spikingjelly_memopt": ("",),
    "spikingjelly_plif": ("", "+graph"),
    "published": ("", "+graph"),
    "loop": ("+compile", "+compile+graph"),
}
