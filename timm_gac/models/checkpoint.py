"""Checkpoints in other layouts and of other numbers of steps, brought to the names and shapes of a model here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["canonical_name", "checkpoint_filter_fn", "resample_temporal_weight"]

_logger = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")

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


def resample_temporal_weight(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """A temporal attention weight for another number of steps.

    Bilinear over both axes, then scaled by the ratio of the input widths, so that the layer's output keeps its size.

    Args:
        weight: ``(out, in)``.
        shape: The new ``(out, in)``.

    Returns:
        ``shape``, in the dtype of ``weight``.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))[None, None]
    resampled = F.interpolate(wide, size=shape, mode="bilinear", align_corners=False)[0, 0]
    return (resampled * (weight.shape[1] / shape[1])).to(weight.dtype)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint as a state_dict of ``model``.

    Accepts the names of this package and both layouts of the published code, bare or wrapped (``{'state_dict': ...}``),
    with or without DataParallel's ``module.`` prefix. Tensors that the published code stores under several names are
    checked to agree and kept once. Temporal weights of another number of steps are resampled, with a warning in the
    log. The tensors of a quantised network (`timm_gac.quantize`) become those of a float network with the same rounded
    weights.

    Args:
        state_dict: The checkpoint.
        model: The model that will load it.

    Raises:
        ValueError: Two names of one tensor hold different values.
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
    if any(name.endswith(".conv2.scale") for name in merged):
        merged = _dequantize(merged, model)
    return _fit_temporal_weights(merged, model)


def _dequantize(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an `IntegerSpikingResNet` as those of the float network with the same rounded weights.

    Its batch norms do nothing but add the shift.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if getattr(module, "running_var", None) is not None:
            found |= {f"{name}.{key}": torch.zeros_like(value) for key, value in module.state_dict().items()}
            found[f"{name}.weight"] += 1.0
            found[f"{name}.running_var"] += 1.0 - float(module.eps)
    for name, value in state_dict.items():
        layer, _, field = name.rpartition(".")
        scale = state_dict.get(f"{layer}.scale")
        if re.search(r"(^|\.)conv[12]$", layer) and field == "bias":
            found[re.sub(r"conv([12])$", r"bn\1.bias", layer)] = value
        elif layer.endswith(".downsample"):
            found[f"{layer}.0.{field}"] = value
        elif field == "weight" and scale is not None:
            found[name] = value.unflatten(1, (3, 3)).permute(0, 3, 1, 2) * scale[:, None, None, None]
        elif field != "scale":
            found[name] = value
    return found


def _fit_temporal_weights(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    for name, target in model.named_parameters():
        weight = state_dict.get(name)
        if weight is None or not re.fullmatch(r"encoder\.temporal\.fc[12]\.weight", name):
            continue
        weight = weight.reshape(weight.shape[0], weight.shape[1])  # published as (out, in, 1, 1, 1)
        if weight.shape != target.shape:
            old, new = tuple(weight.shape), (target.shape[0], target.shape[1])
            _logger.warning("Resampled %s from %s to %s: the checkpoint has another number of steps", name, old, new)
            weight = resample_temporal_weight(weight, new)
        state_dict[name] = weight
    return state_dict
