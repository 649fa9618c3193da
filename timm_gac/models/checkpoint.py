"""Checkpoints in other layouts, brought to the names of a model here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels import int8_weight

from ..layers.convolution import SpikeConv2d

# Scales of a weight that is stored in int8 stand beside it, under its name with this at the end.
_SCALE = ".weight_scale"

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_REMEDY = {
    "quantised": "load its folder with timm_gac.hub.load_model",
    "folded": "load the weights from before `fuse_for_inference` and fold again",
}

# The published code keeps most tensors under several names: `x_s` wraps the layer `x` and its norm, `seqbn` wraps `bn`.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoding\.TA\.sharedMLP\.0\.", "encoder.temporal.fc1."),
        (r"^encoding\.TA\.sharedMLP\.2\.", "encoder.temporal.fc2."),
        (r"^encoding\.SCA\.sharedMLP\.0\.", "encoder.spatial.conv_a."),
        (r"^encoding\.SCA\.sharedMLP\.2\.", "encoder.spatial.conv_b."),
        (r"^fc1(_s\.layer\.module)?\.", "fc."),
        (r"^conv1\.0\.", "conv1."),
        (r"^conv1\.1\.", "bn1."),
        (r"(^|\.)conv(\d)_s\.layer\.module\.", r"\1conv\2."),
        (r"(^|\.)conv(\d)_s\.bn\.", r"\1bn\2."),
        (r"\.shortcut\.(\d)\.", r".downsample.\1."),
        (r"\.downsample\.layer\.module\.", ".downsample.0."),
        (r"\.downsample\.bn\.", ".downsample.1."),
        (r"\.(bn|seqbn\.module)\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r".\2"),
    )
)
_STAGE = re.compile(r"^conv(\d)_x\.")


def canonical_name(name: str) -> str:
    """The name here of a tensor of the published code; a name of ours comes back as it is.

    ``conv2_x.0.shortcut.1.bn.weight`` -> ``layer1.0.downsample.1.weight``
    """
    name = _STAGE.sub(lambda match: f"layer{int(match[1]) - 1}.", name)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def pack_int8_convs(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a network that trains in 8 bits with integers and scales in the place of these weights.

    Empty where no convolution does. `checkpoint_filter_fn` multiplies them again, without rounding.
    """
    convs = [name for name, module in model.named_modules() if isinstance(module, SpikeConv2d) and module.int8]
    if not convs:
        return {}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in convs:
        state[f"{name}.weight"], state[name + _SCALE] = int8_weight(state[f"{name}.weight"])
    return state


def unpack_int8_convs(state: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """A state_dict with the products of `pack_int8_convs`' integers and scales in the place of both.

    Args:
        state: In the names of the network that will load it.
        own: Names of that network's tensors: a scale among them is the network's own.

    Raises:
        ValueError: A scale has no integers beside it.
    """
    scales = [name for name in state if name.endswith(_SCALE) and name not in own]
    unpacked = {name: tensor for name, tensor in state.items() if name not in scales}
    for name in scales:
        weight, scale = state.get(name.removesuffix("_scale")), state[name]
        if weight is None or weight.dtype != torch.int8 or scale.shape != weight.shape[:1]:
            raise ValueError(f"expected an int8 weight of as many channels beside {name}, got none: download it again")
        unpacked[name.removesuffix("_scale")] = weight * scale[(..., *[None] * (weight.dim() - 1))]
    return unpacked


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint as a state_dict of ``model``.

    Accepts the names of this package and both layouts of the published code, bare or wrapped (``{'state_dict': ...}``),
    with or without DataParallel's ``module.`` prefix. Tensors that the published code stores under several names are
    checked to agree and kept once. Temporal weights of another number of steps stay as they are: they are resampled
    when they are loaded.

    Args:
        state_dict: The checkpoint.
        model: The model that will load it.

    Raises:
        ValueError: Two names of one tensor hold different values, or the tensors are those of a folded or quantised
            network, which this one would misread.
    """
    for key in _WRAPPERS:
        inner = state_dict.get(key)
        if isinstance(inner, Mapping):
            state_dict = inner
            break
    merged: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for source, value in state_dict.items():
        name = canonical_name(source.removeprefix("module."))
        if name not in merged:
            merged[name], sources[name] = value, source
        elif name.endswith("num_batches_tracked"):
            merged[name] = torch.maximum(merged[name], value)  # a counter, not used by any computation here
        elif merged[name].shape != value.shape or not torch.equal(merged[name], value):
            raise ValueError(
                f"expected one value of {name!r}, got two under {sources[name]!r} and {source!r}: "
                "the file is damaged or of another layout"
            )
    if "fc.weight" in merged and "conv1.bias" in merged and "bn1.weight" not in merged:
        kind = "quantised" if any(name.endswith(".conv2.scale") for name in merged) else "folded"
        raise ValueError(f"expected weights of a network with batch norms, got those of a {kind} one: {_REMEDY[kind]}")
    return unpack_int8_convs(merged, model.state_dict().keys())
