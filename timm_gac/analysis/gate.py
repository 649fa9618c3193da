"""What the gate of gated attention coding does: its scale, what it varies over, and what the network loses without it.

A neuron that gets ``g * s[t]`` fires above its threshold only where enough spikes s add up, so a gate that hardly
varies still decides, by its level, whether the first neurons can fire at all: see `firing_level`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import LIFSpec

from ..inference.record import gate_scores, record_spikes
from ..layers.encoder import ConstantScore, GatedAttentionCoding
from ..layers.learned import learned_values
from ..models import SpikingResNet
from ..runtime.dtypes import float32_as
from .evaluate import evaluate

QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 0.999, 1.0)
SHUT_BELOW, OPEN_ABOVE = 0.01, 0.99  # values of a gate that is as good as 0 or 1, where its gradient vanishes too
_AXES = {"steps": (0,), "channels": (1,), "pixels": (2, 3)}  # of (T, C, H, W)
_DRAWN = 2_000_000  # values for quantiles: torch.quantile takes at most 16 million
_ROUNDING = 1e-14  # a variance below is none: a float32 of 0.5 is rounded by 3e-8, which squared is 1e-15


@dataclass(frozen=True)
class GateStatistics:
    """What the gate of a network does on images.

    Attributes:
        images: Number of images.
        mean: Of the gate.
        std: Its standard deviation over everything.
        quantiles: Of the gate, by the share of values below.
        shares: Share of its variance that the mean over all other axes explains: over images, steps, channels, pixels;
            and ``interactions``, the rest, which takes several of these together. They add up to 1, or 0 of a constant.
        between_images: Share of its variance that lies between images at the same step, channel and pixel: 0 of a mask
            that is the same for every image, and of a single one.
        shut: Share of gate values below 0.01.
        open: Share of gate values above 0.99.
        temporal: Mean of the temporal score m[t] at each step.
        largest_temporal: Its largest absolute value.
        spatial_std: Standard deviation of the spatial-channel score n.
        firing_level: See `firing_level`; of neurons that learned, with the means of their decays and thresholds. None
            of neurons other than ``lif``.
        above_level: Share of gate values above it, or None.
    """

    images: int
    mean: float
    std: float
    quantiles: dict[float, float]
    shares: dict[str, float]
    between_images: float
    shut: float
    open: float
    temporal: tuple[float, ...]
    largest_temporal: float
    spatial_std: float
    firing_level: float | None
    above_level: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Replaced:
    """Results with another gate in a network's place.

    Attributes:
        gate: Which, see `replaced_gates`.
        top1: Accuracy.
        lif: Firing rate of the neurons behind the encoder.
        agree: Share of images with the class that the unchanged network gives.
    """

    gate: str
    top1: float
    lif: float
    agree: float


def firing_level(spec: LIFSpec, num_steps: int) -> float:
    """Gate above which a neuron of this spec behind the encoder can fire within T steps if its input spikes at each.

    Of a constant input g the membrane is ``g (1 + decay + ... + decay^(T-1))`` after T steps.

    Args:
        spec: The neuron.
        num_steps: T.

    Raises:
        ValueError: Its neuron is not ``lif``.
    """
    spec.refuse_others("the least gate at which it fires")
    return float(spec.threshold) / sum(float(spec.decay) ** step for step in range(num_steps))


def _gated(model: Any) -> GatedAttentionCoding:
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, GatedAttentionCoding):
        raise ValueError(
            f"expected a network with gated attention coding, got {type(encoder).__name__}: name a gac_ one"
        )
    return encoder


def has_learned_gate(model: Any) -> bool:
    """Whether a network has a gate with parameters that `gate_statistics` can measure.

    It has none with direct coding, with an encoder of one's own, or with a gate that is constant, such as ``half``.
    Of a network that is not built on this package's, nobody knows how to run its encoder alone.
    """
    encoder = getattr(model, "encoder", None)
    if type(encoder) is not GatedAttentionCoding or not isinstance(model, SpikingResNet):
        return False
    return any(True for score in gate_scores(encoder).values() for _ in score.parameters())


def _level_behind(model: Any, encoder: GatedAttentionCoding) -> float | None:
    """The `firing_level` of the neuron behind the encoder; None where it is another neuron than ``lif``."""
    if not encoder.spec.is_lif:
        return None
    learned = learned_values(getattr(model, "lif", None))
    behind: dict[str, Any] = {name: float(value.mean()) for name, value in learned.items()}
    return firing_level(dataclasses.replace(encoder.spec, **behind), encoder.num_steps)


class _Sums:
    """Sums over the batches of a gate, on its device.

    Args:
        level: Of which the share of values above is counted; None for none.
    """

    def __init__(self, level: float | None) -> None:
        self.level = math.inf if level is None else level
        self.count = 0
        self.of_images, self.temporal, self.drawn = list[Tensor](), list[Tensor](), list[Tensor]()
        self.places: Tensor | None = None  # [T, C, H, W], over images
        self.moments = torch.zeros(4, dtype=torch.float64)  # mean square, shares shut, open and above the level
        self.spatial = torch.zeros(2, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, gate: Tensor, scores: dict[str, Tensor]) -> None:
        """Add a gate ``(B, T, C, H, W)`` and the scores that it is made of."""
        gate = gate.double()
        count = len(gate)
        self.count += count
        self.of_images.append(gate.mean((1, 2, 3, 4)).cpu())
        places = gate.sum(0)
        self.places = places if self.places is None else self.places + places
        beyond = (gate < SHUT_BELOW, gate > OPEN_ABOVE, gate > self.level)
        moments = [gate.square().mean(), *(part.sum().double() / gate.numel() for part in beyond)]
        self.moments += torch.stack(moments).cpu() * count
        self.temporal.append(scores["temporal"].double().cpu())
        score = scores["spatial"].double()
        self.spatial += torch.stack([score.mean(), score.square().mean()]).cpu() * count
        flat = gate.flatten()
        drawn = torch.randint(len(flat), (min(len(flat), 100_000),), generator=self._generator)
        self.drawn.append(flat[drawn.to(flat.device)].cpu())

    def result(self, level: float | None) -> GateStatistics:
        """The statistics of all that was added."""
        if self.places is None:
            raise ValueError("expected at least one image, got none: check the data")
        places, of_images = self.places.cpu() / self.count, torch.cat(self.of_images)
        mean = float(of_images.mean())
        square, shut, opened, above = (self.moments / self.count).tolist()
        variance = square - mean**2
        variance = 0.0 if variance <= _ROUNDING else variance  # NaN stays
        explained = {"images": float(of_images.var(correction=0))}
        for name, kept in _AXES.items():
            part = places.mean([axis for axis in range(4) if axis not in kept])
            explained[name] = float(part.var(correction=0))
        explained["interactions"] = max(variance - sum(explained.values()), 0.0)
        between = min(max(square - float(places.square().mean()), 0.0), variance)
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        quantiles = torch.quantile(torch.cat(self.drawn)[:_DRAWN], levels).tolist()
        temporal = torch.cat(self.temporal)
        spatial_mean, spatial_square = (self.spatial / self.count).tolist()
        return GateStatistics(
            images=self.count,
            mean=mean,
            std=math.sqrt(variance),
            quantiles=dict(zip(QUANTILES, quantiles, strict=True)),
            shares={name: part / variance if variance else 0.0 for name, part in explained.items()},
            between_images=between / variance if variance else 0.0,
            shut=shut,
            open=opened,
            temporal=tuple(temporal.mean(0).tolist()),
            largest_temporal=float(temporal.abs().max()),
            spatial_std=math.sqrt(max(spatial_square - spatial_mean**2, 0.0)),
            firing_level=level,
            above_level=None if level is None else above,
        )


@float32_as("ieee")
@torch.no_grad()
def gate_statistics(model: Any, batches: Iterable[Tensor]) -> GateStatistics:
    """Scale and variance of a network's gate.

    Args:
        model: The network, in eval mode.
        batches: Images ``(B, C, H, W)`` or event frames ``(B, T, C, H, W)`` of one size, on its device.

    Raises:
        ValueError: The network has no gate, or there are no images.
    """
    level = _level_behind(model, _gated(model))
    sums = _Sums(level)
    for batch in batches:
        with record_spikes(model) as recording:
            model.forward_intermediates(batch, indices=[0], stop_early=True, intermediates_only=True)
        sums.add(recording.gate, recording.scores)  # type: ignore[arg-type]
    return sums.result(level)


class _Averaged(nn.Module):
    """A score averaged over some axes.

    Args:
        score: The attention that computes it.
        axes: Over which axes of the score.
    """

    def __init__(self, score: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.score, self.axes = score, axes

    def forward(self, *inputs: Tensor) -> Tensor:
        """The score's mean, in the score's shape."""
        score = self.score(*inputs)
        return score.mean(self.axes, keepdim=True).expand_as(score).contiguous()


def replaced_gates(mean: float) -> dict[str, Callable[[GatedAttentionCoding], tuple[nn.Module, nn.Module]]]:
    """Other gates for an encoder: by name what gives its temporal and spatial score modules.

    Args:
        mean: Mean of its gate, for ``mean``.
    """

    def constant(value: float) -> Callable[[GatedAttentionCoding], tuple[nn.Module, nn.Module]]:
        score = math.log(value / (1.0 - value)) if value < 1.0 else 1e4  # whose sigmoid is 1
        return lambda encoder: (ConstantScore(1.0), ConstantScore(score))

    return {
        "as trained": lambda encoder: (encoder.temporal, encoder.spatial),
        "steps alike": lambda encoder: (_Averaged(encoder.temporal, (1,)), encoder.spatial),
        "pixels alike": lambda encoder: (encoder.temporal, _Averaged(encoder.spatial, (2, 3))),
        f"its mean, {mean:.3f}": constant(mean),
        "0.5": constant(0.5),
        "1 (plain spikes)": constant(1.0),
    }


@contextmanager
def replaced_scores(model: Any, scores: tuple[nn.Module, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of the gate's two attentions, within ``with``.

    Args:
        model: A network with gated attention coding.
        scores: Modules of the temporal and the spatial-channel score.
    """
    encoder = _gated(model)
    kept = encoder.temporal, encoder.spatial
    try:
        encoder.temporal, encoder.spatial = scores
        yield
    finally:
        encoder.temporal, encoder.spatial = kept


@torch.no_grad()
def try_gates(
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    mean: float,
    calibrate: Callable[[Any], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Replaced]:
    """Accuracy of a trained network with other gates in the place of its own.

    Args:
        model: The network, in eval mode. It is as before afterwards.
        batches: Images and labels, on its device.
        mean: Mean of its gate.
        calibrate: Called with a copy of the network for each gate, to fit its batch norms to it; None leaves them.
        progress: Called with the number of images after each batch.
    """
    results, classes = list[Replaced](), list[Tensor]()
    for name, scores in replaced_gates(mean).items():
        network = model if calibrate is None else copy.deepcopy(model)
        given = list[Tensor]()

        def keep(_module: nn.Module, _inputs: Any, logits: Tensor, given: list[Tensor] = given) -> None:
            given.append(logits)

        with replaced_scores(network, scores(_gated(network))):
            if calibrate is not None:
                calibrate(network)
            handle = network.fc.register_forward_hook(keep)
            try:
                result = evaluate(network, batches, progress=progress)
            finally:
                handle.remove()
        answers = torch.cat([logits.unflatten(0, (model.num_steps, -1)).mean(0).argmax(1) for logits in given])
        classes.append(answers)
        agree = float((answers == classes[0]).double().mean())
        results.append(Replaced(name, result.top1, result.firing_rates.get("lif", math.nan), agree))
    return results


@float32_as("ieee")
def weight_and_gradient(model: Any, images: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Root mean squares of weights and of their gradients, of one batch's cross entropy in training mode.

    Args:
        model: The network; its gradients are discarded and its statistics restored.
        images: ``(B, C, H, W)``.
        labels: ``(B,)``.

    Returns:
        By part of the network: ``encoder.temporal``, ``encoder.spatial``, ``conv1``, each stage's convolutions, ``fc``.
    """
    network = copy.deepcopy(model).train()
    F.cross_entropy(network(images), labels).backward()
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and parameter.grad is not None:
            parts = name.split(".")
            groups.setdefault(".".join(parts[: 2 if parts[0] == "encoder" else 1]), []).append(parameter)

    def rms(tensors: list[Tensor]) -> float:
        return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).double().square().mean().sqrt())

    return {
        name: (rms(list(parameters)), rms([parameter.grad for parameter in parameters if parameter.grad is not None]))
        for name, parameters in groups.items()
    }
