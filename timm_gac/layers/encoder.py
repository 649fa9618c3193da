"""Input encoders: gated attention coding and direct coding."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from gac_kernels import CIFAR, LIFSpec, gac_encode, gac_fire, gated_lif
from gac_kernels.checks import check_spec, check_tensor
from gac_kernels.common.tiles import is_channels_last

from .checks import check_count, check_num_steps, fixed_num_steps
from .convolution import Conv2d
from .learned import LearnedValues, learned_values, make_learned
from .neuron_layer import at_least_float32
from .noise import adds_noise, draw_noise
from .weight_decay import warn_of_decay

_logger = logging.getLogger(__name__)


class TemporalAttention(nn.Module):
    """One score per sample and time step: ``W2 relu(W1 average) + W2 relu(W1 maximum)``, without bias.

    A state_dict of another number of steps loads too: its weights are resampled, with a warning in the log.

    Shape:
        - ``average``, ``maximum``: ``(B, T)``, each frame pooled over channels and space
        - output: ``(B, T)``, before the sigmoid

    Args:
        num_steps: Number of time steps T.
        reduction: Hidden width is ``T // reduction``, at least 1.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582), the temporal attention of gated attention coding.
    """

    def __init__(
        self,
        num_steps: int,
        reduction: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_steps = check_num_steps(num_steps)
        self.reduction = reduction = check_count("reduction", reduction, 2)
        hidden = max(1, num_steps // reduction)
        self.fc1 = nn.Linear(num_steps, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_steps, bias=False, device=device, dtype=dtype)
        # PyTorch's initial values, but no hidden unit with a negative sum: all frames of a static image are equal and
        # their maximum is positive, so such a unit would be silent on every image and, behind a ReLU, stay so.
        with torch.no_grad():
            self.fc1.weight.mul_(torch.where(self.fc1.weight.sum(1, keepdim=True) < 0, -1.0, 1.0))

    def forward(self, average: Tensor, maximum: Tensor) -> Tensor:
        """Scores ``(B, T)``."""
        return self.fc2(F.relu(self.fc1(average))) + self.fc2(F.relu(self.fc1(maximum)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [f"{prefix}{name}.weight" for name in ("fc1", "fc2")]
        weights = [state_dict.get(name) for name in names]
        if all(isinstance(weight, Tensor) and weight.ndim >= 2 for weight in weights):
            # The published code has them as (out, in, 1, 1, 1).
            first, second = (weight.flatten(1) for weight in weights)  # type: ignore[union-attr]
            num_steps = first.shape[1]
            hidden = max(1, num_steps // self.reduction)
            if first.shape == (hidden, num_steps) and second.shape == (num_steps, hidden):
                for name, weight, layer in zip(names, (first, second), (self.fc1, self.fc2), strict=True):
                    state_dict[name] = _fitted(name, weight, layer.weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _fitted(name: str, weight: Tensor, target: Tensor) -> Tensor:
    if weight.shape == target.shape:
        return weight
    old, new = tuple(weight.shape), (target.shape[0], target.shape[1])
    _logger.warning("Resampled %s from %s to %s: the checkpoint has another number of steps", name, old, new)
    return resample_temporal_weight(weight, new)


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


class SpatialChannelAttention(nn.Module):
    """One score per pixel and channel of a frame: two 4x4 'same' convolutions with a ReLU between, without bias.

    Shape:
        - ``(N, C, H, W)`` -> ``(N, C, H, W)``, before the sigmoid

    Args:
        channels: Number of channels C.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582), the spatial-channel attention of gated attention coding.
    """

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv_a = Conv2d(channels, channels, 4, bias=False, device=device, dtype=dtype)
        self.conv_b = Conv2d(channels, channels, 4, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Scores in the shape of ``x``."""
        # 'same' for an even kernel: one before, two after; the ReLU between the two is done on the way.
        x = self.conv_a(torch.ops.gac_kernels.pad_frames(x, 1, 2, False))
        return self.conv_b(torch.ops.gac_kernels.pad_frames(x, 1, 2, True))


class ConstantScore(nn.Module):
    """A score without parameters, in place of an attention that is left out of the gate.

    Shape:
        - any, the attention's own input -> a tensor of that shape

    Args:
        value: The score, before the sigmoid: 1 leaves the other score as it is, 0 makes the gate 0.5.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """The score in shape, dtype and memory format of ``x``."""
        return torch.full_like(x, self.value)

    def extra_repr(self) -> str:
        """The score."""
        return f"{self.value}"


# Scores (temporal, spatial) that are constant in each kind of gate; None is computed.
GATES: dict[str, tuple[float | None, float | None]] = {
    "full": (None, None),
    "spatial": (1.0, None),
    "temporal": (None, 1.0),
    "half": (1.0, 0.0),
    "open": (1.0, 1e4),  # its sigmoid is 1 in every dtype
}


@register_notrace_module
class GatedAttentionCoding(nn.Module):
    """Gated attention coding (GAC): real-valued frames to gated spikes, in front of any spiking network.

    ``y[t] = sigmoid(m[t] * n[t]) * LIF(A)[t]`` with the temporal score m, the spatial-channel score n and the frames A.
    For a static image all A[t] are equal, so n and the pools are computed once and the repetition never exists in
    memory. On frames the gate is not causal: every m[t] depends on the pools of all T frames, so the first output needs
    the last frame.

    Shape:
        - static image: ``(B, C, H, W)`` -> ``(T, B, C, H, W)``
        - frames: ``(T, B, C, H, W)`` -> ``(T, B, C, H, W)``

    Args:
        channels: Number of channels C.
        num_steps: Number of time steps T.
        spec: What the neuron computes.
        reduction: Hidden width of the temporal attention is ``T // reduction``, at least 1.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        gate: ``full``; or, to see what it is worth, ``spatial`` (m = 1), ``temporal`` (n = 1), ``half`` (always 0.5) or
            ``open`` (always 1: plain spikes). An attention that is left out has no parameters.
        learnable: Learn decay and threshold of the neuron, see `LIF`.

    Raises:
        ValueError: ``spec`` is no `LIFSpec`, ``gate`` or ``learnable`` is unknown, ``channels``, ``num_steps`` or
            ``reduction`` is no integer >= 1, or the input has another rank, number of channels or number of steps.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582), section "Gated attention coding".
    """

    returns_pair = False
    spikes_dtype = None  # that of its input
    num_steps = fixed_num_steps()
    current_noise = 0.0  # see SpikingResNet.set_current_noise
    learned: LearnedValues | None

    def __init__(
        self,
        channels: int,
        num_steps: int,
        spec: LIFSpec = CIFAR,
        reduction: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        gate: str = "full",
        learnable: str | None = None,
    ) -> None:
        super().__init__()
        check_spec(spec)
        if not isinstance(gate, str) or gate not in GATES:
            raise ValueError(f"expected gate out of {', '.join(GATES)}, got {gate!r}: choose one of these")
        self.gate = gate
        self.channels = channels = check_count("channels", channels, 64)
        self.num_steps = num_steps = check_num_steps(num_steps)
        self.spec = spec
        temporal, spatial = GATES[gate]
        self.temporal: nn.Module = (
            TemporalAttention(num_steps, reduction, device=device, dtype=dtype)
            if temporal is None
            else ConstantScore(temporal)
        )
        self.spatial: nn.Module = (
            SpatialChannelAttention(channels, device=device, dtype=dtype) if spatial is None else ConstantScore(spatial)
        )
        self.learned = make_learned(learnable, spec, channels, device=device, dtype=dtype)
        warn_of_decay(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("gate", "full")  # stored whole before there was a choice
        warn_of_decay(self)  # copies do not pass the constructor

    def forward(self, stem: Tensor) -> Tensor:
        """Gated spikes ``(T, B, C, H, W)``, real-valued in [0, 1), in the dtype of ``stem``."""
        spatial, temporal = self._scores(stem)
        if adds_noise(self):
            return self._encode_noisy(stem, spatial, temporal)
        gate = gac_encode if stem.ndim == 4 else gated_lif
        return gate(stem, spatial, temporal, self.spec, **learned_values(self))

    def _encode_noisy(self, stem: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        """The output with noise on the neuron's current, so that frames of an image differ; its scores see none."""
        frames, scores = (at_least_float32(x) for x in (stem, spatial))  # 16 bits would round a small noise away
        if stem.ndim == 4:
            frames, scores = (x.expand(self.num_steps, *x.shape) for x in (frames, scores))
        frames = frames + draw_noise(self, frames, axis=2)
        return gated_lif(frames, scores, temporal, self.spec, **learned_values(self)).to(stem.dtype)

    def encode_and_fire(
        self, stem: Tensor, spikes_dtype: torch.dtype | None = None, second: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gated spikes, and the spikes of a neuron with the same spec that integrates them, ``(T, B, C, H, W)`` each.

        What `forward` and a `LIF` behind it give, in one pass and without noise. The second spikes are in
        ``spikes_dtype``: the dtype of ``stem`` if None, or torch.int8. ``second`` is that neuron, where it learns its
        decay and threshold.
        """
        spatial, temporal = self._scores(stem)
        of_second = {f"second_{name}": value for name, value in learned_values(second).items()}
        return gac_fire(stem, spatial, temporal, self.spec, spikes_dtype, **learned_values(self), **of_second)

    def _scores(self, stem: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial-channel scores in the shape of ``stem`` and temporal scores ``(B, T)``, before the sigmoid."""
        _check_input(stem, self.num_steps)
        if stem.shape[-3] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {stem.shape[-3]}: match `channels` to the input")
        static = stem.ndim == 4
        folded = stem if static else stem.flatten(0, 1)
        # The mean is float32 at least: a 16-bit one over C*H*W values keeps 8 to 11 bits. A maximum is exact as it is.
        pools = torch.ops.gac_kernels.pool_frames(folded)[:2]
        if static:
            average, maximum = (pool.unsqueeze(1).expand(-1, self.num_steps) for pool in pools)
        else:
            average, maximum = (pool.unflatten(0, [stem.shape[0], stem.shape[1]]).t() for pool in pools)
        dtype = _dtype_of(getattr(self.temporal, "fc1", self.temporal))
        temporal = self.temporal(average.to(dtype), maximum.to(dtype))  # (B, T)
        spatial = self.spatial(folded).to(stem.dtype)
        spatial = spatial.view_as(stem) if static else spatial.unflatten(0, [stem.shape[0], stem.shape[1]])
        return spatial, temporal

    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """See `NeuronLayer`."""
        stem = at_least_float32(inputs[0])
        return stem.unsqueeze(0).expand(num_steps, *stem.shape) if stem.ndim == 4 else stem

    def output_spikes(self, output: Tensor) -> Tensor:
        """See `NeuronLayer`; they are gated, so real values in [0, 1)."""
        return output.flatten(0, 1)

    def extra_repr(self) -> str:
        """Channels, steps and the spec's fields."""
        gate = "" if self.gate == "full" else f", gate={self.gate!r}"
        return f"{self.channels}, num_steps={self.num_steps}, {self.spec}{gate}"


@register_notrace_module
class DirectCoding(nn.Module):
    """Direct coding, the baseline encoder: every time step sees the same real-valued image.

    Shape:
        - static image: ``(B, C, H, W)`` -> ``(T, B, C, H, W)``, an expanded view without a copy; of a channels-last
          image a copy, so that ``flatten(0, 1)`` is channels-last too
        - frames: ``(T, B, C, H, W)`` -> the same tensor

    Args:
        num_steps: Number of time steps T.

    Raises:
        ValueError: The input has another rank or number of steps.
    """

    num_steps = fixed_num_steps()

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = check_num_steps(num_steps)

    def forward(self, stem: Tensor) -> Tensor:
        """The frames ``(T, B, C, H, W)``."""
        _check_input(stem, self.num_steps)
        if stem.ndim == 5:
            return stem
        if is_channels_last(stem):
            # Flattened, an expanded view would become contiguous, and every layer behind would run in that layout.
            rows = stem.permute(0, 2, 3, 1).expand(self.num_steps, -1, -1, -1, -1).contiguous()
            return rows.permute(0, 1, 4, 2, 3)
        return stem.unsqueeze(0).expand(self.num_steps, -1, -1, -1, -1)

    def extra_repr(self) -> str:
        """The number of steps."""
        return f"num_steps={self.num_steps}"


def _dtype_of(linear: nn.Module) -> torch.dtype:
    """What a linear layer computes in; float32 where its weight is no floating tensor, as in a quantised one."""
    weight = getattr(linear, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32


def _check_input(stem: Tensor, num_steps: int) -> None:
    check_tensor("stem", stem)
    if stem.ndim != 4 and stem.ndim != 5:
        raise ValueError(f"expected (B, C, H, W) or (T, B, C, H, W), got {stem.shape}: add or fold axes")
    if stem.ndim == 5 and stem.shape[0] != num_steps:
        advice = "create the module with num_steps equal to the number of frames"
        if stem.shape[1] == num_steps:
            advice = "swap its first two axes with x.transpose(0, 1)"
        raise ValueError(
            f"expected num_steps={num_steps} frames on axis 0 of (T, B, C, H, W), got {stem.shape[0]}: {advice}"
        )
