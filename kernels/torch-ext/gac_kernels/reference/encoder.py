"""Gated attention coding by literal repetition over time, and the padding and pooling of its attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import CIFAR, LIFSpec
from .neuron import lif_reference, state_dtype


def gated_lif_reference(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    spec: LIFSpec = CIFAR,
    smooth: bool = False,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Gated spikes of an input that varies over time: ``sigmoid(temporal[t] * spatial[t]) * LIF(x)[t]``.

    Args:
        x: (T, B, C, H, W), input current.
        spatial: (T, B, C, H, W), spatial-channel attention before the sigmoid.
        temporal: (B, T), temporal attention before the sigmoid.
        spec: Dynamics and surrogate.
        smooth: Differentiable twin for numerical gradient checks.
        decay: In the place of the spec's: one element or (C,).
        threshold: Likewise.

    Returns:
        (T, B, C, H, W) in x's dtype, values in [0, 1).

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """
    dtype = state_dtype(x.dtype)
    spikes = lif_reference(x.to(dtype), spec, smooth=smooth, decay=decay, threshold=threshold)
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    scores = temporal.to(dtype).t()[:, :, None, None, None] * spatial.to(dtype)  # (T, B, C, H, W)
    return (torch.sigmoid(scores) * spikes).to(x.dtype)


def gac_encode_reference(
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    spec: LIFSpec = CIFAR,
    smooth: bool = False,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Gated attention coding of a static image by literal repetition over time.

    Args:
        stem: (B, C, H, W), the stem's output, the same at every step.
        spatial: (B, C, H, W), spatial-channel attention before the sigmoid.
        temporal: (B, T), temporal attention before the sigmoid.
        spec: Dynamics and surrogate.
        smooth: Differentiable twin for numerical gradient checks.
        decay: In the place of the spec's: one element or (C,).
        threshold: Likewise.

    Returns:
        (T, B, C, H, W) in stem's dtype, values in [0, 1).
    """
    repeats = (temporal.shape[1], *stem.shape)
    return gated_lif_reference(
        x=stem.expand(repeats),
        spatial=spatial.expand(repeats),
        temporal=temporal,
        spec=spec,
        smooth=smooth,
        decay=decay,
        threshold=threshold,
    )


def gac_fire_reference(
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    spec: LIFSpec = CIFAR,
    spikes_dtype: torch.dtype | None = None,
    smooth: bool = False,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
    second_decay: Tensor | None = None,
    second_threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated attention coding, then a second neuron with the same spec.

    Args:
        stem: (B, C, H, W), the same at every step, or (T, B, C, H, W).
        spatial: Spatial-channel attention before the sigmoid, in the shape of stem.
        temporal: (B, T), temporal attention before the sigmoid.
        spec: Dynamics and surrogate of both neurons.
        spikes_dtype: Dtype of the spikes; stem's if None.
        smooth: Differentiable twin for numerical gradient checks.
        decay: Of the encoder's neuron in the place of the spec's: one element or (C,).
        threshold: Likewise.
        second_decay: Of the second neuron in the place of the spec's, likewise.
        second_threshold: Likewise.

    Returns:
        Gated spikes and the second neuron's spikes, (T, B, C, H, W) each.
    """
    gate = gac_encode_reference if stem.dim() == 4 else gated_lif_reference
    gated = gate(stem, spatial, temporal, spec, smooth, decay=decay, threshold=threshold)
    spikes = lif_reference(gated, spec, smooth=smooth, decay=second_decay, threshold=second_threshold)
    assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
    return gated, spikes if spikes_dtype is None else spikes.to(spikes_dtype)


def pad_frames_reference(x: Tensor, before: int, after: int, rectify: bool = False) -> Tensor:
    """Zero padding on both sides of both axes of a frame, after a ReLU with ``rectify``.

    Args:
        x: (N, C, H, W).
        before: Rows above and columns to the left.
        after: Rows below and columns to the right.
        rectify: Set negative values to 0.

    Returns:
        (N, C, H + before + after, W + before + after) in x's dtype.
    """
    return F.pad(x.relu() if rectify else x, [before, after, before, after])


def pool_frames_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum of each frame over channels and space.

    Args:
        x: (N, C, H, W). The gradient at the maximum is shared evenly by all elements equal to it.

    Returns:
        Mean (N,) in float32 (float64 for float64) and maximum (N,) in x's dtype.
    """
    return x.mean((1, 2, 3), dtype=state_dtype(x.dtype)), x.amax((1, 2, 3))
