"""Blocks that train in 8 bits: where convolution, norm and neuron run as one layer of `gac_kernels.eight_bit`."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels.backend import resolve_backend
from gac_kernels.common.triton import INTERPRETED
from gac_kernels.eight_bit.layer import Call, Running, conv_norm_fire
from gac_kernels.eight_bit.norm import MAX_STEPS, Spikes
from gac_kernels.registry import BUILT_IN

from .batch_statistics import batch_statistics, is_synchronised, uses_batch
from .checks import may_skip
from .convolution import SpikeConv2d
from .lif import LIF
from .neuron import BatchNormLIF, MembraneBatchNormLIF
from .noise import adds_noise
from .shared_norm import NORM_FORWARDS

_logger = logging.getLogger(__name__)
_NEURONS = (BatchNormLIF.forward, MembraneBatchNormLIF.forward)
_SHORTCUTS = (nn.Sequential.forward,)
_FIRST_CAPABILITY = (8, 9)  # of GPUs with tensor cores for float8
SWITCH = "TIMM_GAC_EIGHT_BIT_KERNELS"  # 0: float32 convolutions of the same integers


def why_not(device: torch.device, dtype: torch.dtype, num_steps: int) -> str:
    """Why the kernels cannot run on a device, in a dtype, with so many steps; empty where they can."""
    if resolve_backend(device, dtype) != "triton":
        return f"no Triton for {dtype} on {device.type}"
    if num_steps > MAX_STEPS:
        return f"{num_steps} time steps are more than {MAX_STEPS}"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY):
        return "the GPU has no tensor cores for float8 e4m3"
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 is in the environment"
    return "" if device.type == "cuda" or INTERPRETED else f"no Triton for {device.type}"


def takes_layer(conv: nn.Module, neuron: nn.Module) -> str:
    """Why a convolution and the neuron behind it cannot be one layer; empty where they can."""
    if not isinstance(conv, SpikeConv2d) or not conv.int8 or not may_skip(conv, (SpikeConv2d.forward,)):
        return "a convolution is watched, replaced or not in 8 bits"
    if not isinstance(neuron, BatchNormLIF) or not may_skip(neuron, _NEURONS):
        return "a neuron is watched or replaced"
    norm: Any = neuron.norm
    if not may_skip(norm, NORM_FORWARDS) or not may_skip(neuron.lif, (LIF.forward,)):
        return "a norm or neuron is watched or replaced"
    if is_synchronised(norm):
        return "batch norms share their statistics"
    if not uses_batch(norm):
        return "a batch norm is frozen"
    if norm.momentum is None:
        return "running statistics are a cumulative average"
    if neuron.spec.surrogate_id >= len(BUILT_IN):
        return "the neuron or its surrogate is a registered one"
    if neuron.learned is not None:
        return "neurons learn their decay or threshold"
    if neuron.drop_path > 0.0:
        return "blocks are dropped"
    if adds_noise(neuron.lif):
        return "noise is added to currents"
    running = [neuron._buffers.get(name) for name in ("running_mean", "running_var")]
    if any(value is not None and not value.is_contiguous() for value in running):
        return "running statistics have gaps in memory"
    return ""


@functools.cache
def say(reason: str) -> None:
    """Say once that training in 8 bits runs as `int8_conv2d`, convolution by convolution."""
    _logger.warning("training in 8 bits runs slower than it could, with the same rounding: %s", reason)


def _running(norm: Any, buffers: dict[str, Any]) -> Running:
    if not (norm.training and norm.track_running_stats):
        return Running()
    return Running(buffers["running_mean"], buffers["running_var"], norm.momentum, buffers["num_batches_tracked"])


def takes_shortcut(shortcut: nn.Module | None, neuron: Any) -> str:
    """Why a block's shortcut, None for the identity, cannot go into the layer of its last neuron."""
    if shortcut is None:
        return ""
    if not isinstance(shortcut, nn.Sequential) or len(shortcut) != 2 or not may_skip(shortcut, _SHORTCUTS):
        return "a shortcut is watched or replaced"
    norm: Any = shortcut[1]
    if not may_skip(norm, (nn.BatchNorm2d.forward,)) or not uses_batch(norm):
        return "a shortcut's batch norm is watched, replaced, shared or frozen"
    affine = (neuron.weight is None, neuron.bias is None)
    return "" if (norm.weight is None, norm.bias is None) == affine else "a shortcut's batch norm has other parameters"


def layer(
    conv: Any,
    neuron: Any,
    edge: Tensor,
    spikes: Spikes,
    residual: Tensor | None = None,
    residual_norm: Any = None,
    full: bool = False,
) -> tuple[Tensor, Tensor, Spikes | None]:
    """Convolution, norm, residual and neuron, of which `takes_layer` says that they can be one.

    Args:
        conv: `SpikeConv2d` in 8 bits.
        neuron: `BatchNormLIF`.
        edge: The spikes' edge, see `conv_norm_fire`.
        spikes: ``(T*B, C, H, W)``.
        residual: ``(T*B, C', H', W')``, in the dtype of the edge.
        residual_norm: A batch norm in training for the residual.
        full: Whether other layers follow.

    Returns:
        Edge or, with ``full``, spikes; membrane; spikes in 8 bits.
    """
    norm = neuron.norm
    res_statistics, res_affine, res_eps = None, (None, None), 0.0
    if residual_norm is not None and residual is not None:
        res_statistics = batch_statistics(residual_norm, residual.detach(), residual_norm._buffers)
        res_affine, res_eps = (residual_norm.weight, residual_norm.bias), residual_norm.eps
    weight, join, later = conv.weight, None, None
    if conv.cast_weight is not None:  # its gradient is computed on a second stream, beside norms
        weight, pending, index = conv.cast_weight
        join, later = pending.join, functools.partial(pending.start, index)
    call = Call(
        stride=conv.stride[0],
        num_steps=neuron.num_steps,
        neuron=neuron.spec.op_arguments,
        dtype=edge.dtype,
        eps=norm.eps,
        running=_running(norm, neuron._buffers),
        res_statistics=res_statistics,
        res_eps=res_eps,
        keep_membrane=neuron.returns_pair,
        full=full,
        join=join,
        later=later,
    )
    return conv_norm_fire(edge, spikes, weight, call, (neuron.weight, neuron.bias), residual, res_affine)
