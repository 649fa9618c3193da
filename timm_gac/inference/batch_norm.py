"""Folding of batch norms into convolutions: what can be folded, plain weights, and the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchvision.ops import FrozenBatchNorm2d

from gac_kernels import int8_weight

from ..layers.convolution import Conv2d, SpikeConv2d
from ..layers.neuron import BatchNormLIF, MembraneBatchNormLIF
from ..layers.shared_norm import NORM_FORWARDS
from ..models.ann_resnet import refuse_ann
from ..models.blocks import STAGES, MSBlock, SpikingBlock
from ..models.network import SpikingResNet

_BLOCK_FORWARDS = (MSBlock.forward, SpikingBlock.forward)
_CONVOLUTION_FORWARDS = (nn.Conv2d.forward, Conv2d.forward, SpikeConv2d.forward)
_NEURON_FORWARDS = (BatchNormLIF.forward, MembraneBatchNormLIF.forward)
_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, FrozenBatchNorm2d.forward)


def check_foldable(model: nn.Module) -> list[MSBlock | SpikingBlock]:
    """The blocks of a network whose batch norms can all be folded into the convolutions before them.

    Raises:
        ValueError: The model is no spiking network of this package, is folded or quantised already, has a batch norm
            without running statistics, or has a module of another kind in the place of a block, convolution or norm.
    """
    refuse_ann(model, "folding and quantising")
    if not isinstance(model, SpikingResNet):
        raise ValueError(f"expected a spiking network of this package, got {type(model).__name__}: see timm-gac models")
    if model.inference_only:
        raise ValueError(
            "expected a network with batch norm, got one folded or quantised already: take the one it was made of"
        )
    _check_pair("conv1", model.conv1, "bn1", model.bn1, _NORM_FORWARDS)
    blocks: list[Any] = []
    for stage in STAGES:
        for index, block in enumerate(getattr(model, stage)):
            name = f"{stage}.{index}"
            _check_kind(name, block, _BLOCK_FORWARDS, "MSBlock or SpikingBlock")
            _check_pair(f"{name}.conv1", block.conv1, f"{name}.bn1", block.bn1, _NEURON_FORWARDS)
            _check_pair(f"{name}.conv2", block.conv2, f"{name}.bn2", block.bn2, _NEURON_FORWARDS)
            if block.downsample is not None:
                if not isinstance(block.downsample, nn.Sequential) or len(block.downsample) != 2:
                    kind = " ".join(str(block.downsample).split())[:80]
                    raise ValueError(
                        f"expected {name}.downsample as convolution and batch norm, got {kind}: it cannot be folded"
                    )
                conv, norm = block.downsample
                _check_pair(f"{name}.downsample.0", conv, f"{name}.downsample.1", norm, _NORM_FORWARDS)
            blocks.append(block)
    return blocks


def _check_pair(conv_name: str, conv: Any, norm_name: str, norm: Any, norm_forwards: tuple[Any, ...]) -> None:
    _check_kind(conv_name, conv, _CONVOLUTION_FORWARDS, "a plain convolution")
    kind = "BatchNormLIF" if norm_forwards is _NEURON_FORWARDS else "a plain batch norm"
    _check_kind(norm_name, norm, norm_forwards, kind)
    if norm_forwards is _NEURON_FORWARDS:
        _check_kind(f"{norm_name}.norm", norm.norm, NORM_FORWARDS, "a plain batch norm")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"expected batch norms with running statistics, got {norm_name} without: set running_mean and running_var"
        )


def _check_kind(name: str, module: nn.Module, forwards: tuple[Any, ...], kind: str) -> None:
    # By the forward function: a parametrised module has a class of its own, which inherits it.
    if type(module).forward not in forwards or "forward" in vars(module):
        raise ValueError(
            f"expected {kind} as {name}, got {type(module).__name__} with a forward of its own: it cannot be folded"
        )


def plain_weights(model: nn.Module) -> None:
    """Replace weights that are computed by what they are computed to, in place.

    These are parametrizations, pruning, weight and spectral norm, and the 8 bits of `SpikingResNet.set_int8_convs`.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # A copy shares its class with the original, from which removing would take the weight away.
            own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                with torch.enable_grad():  # else a tensor that learns becomes a buffer
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if isinstance(module, SpikeConv2d) and module.int8:
            integers, scale = int8_weight(module.weight)
            module.weight.data.copy_(integers * scale[:, None, None, None])
            module.int8 = False


def fold_batch_norm(conv: nn.Conv2d, norm: Any) -> Tensor:
    """Scale a convolution's weights, in place, by the batch norm that follows it.

    Args:
        conv: With a plain weight; a bias goes into the shift.
        norm: With running statistics.

    Returns:
        The shift that is left, (C,) in float64.
    """
    scale, shift = norm_scale_and_shift(conv, norm)
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    conv.bias = None
    return shift


def norm_scale_and_shift(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies a convolution's sums with and adds to them, (C,) each in float64.

    Args:
        conv: A bias goes into the shift.
        norm: With running statistics.
    """
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(scale)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    if norm.bias is not None:
        shift = norm.bias.double()
    mean = norm.running_mean.double()
    if conv.bias is not None:
        mean = mean - conv.bias.double()
    return scale, shift - mean * scale
