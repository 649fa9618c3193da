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

from ..inference.record import record_spikes
from ..layers.encoder import ConstantScore, GatedAttentionCoding
from ..layers.learned import learned_values
from ..runtime.dtypes import float32_as
from .evaluate import evaluate

QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 0.999, 1.0)
AXES = {"images": (0,), "steps": (1,), "channels": (2,), "pixels": (3, 4)}  # of (B, T, C, H, W)
_DRAWN = 2_000_000  # values a batch for quantiles: torch.quantile takes at most 16 million


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
        temporal: Mean of the temporal score m[t] at each step.
        spatial_std: Standard deviation of the spatial-channel score n.
        firing_level: See `firing_level`; of neurons that learned, with the means of their decays and thresholds.
        above_level: Share of gate values above it.
    """

    images: int
    mean: float
    std: float
    quantiles: dict[float, float]
    shares: dict[str, float]
    temporal: tuple[float, ...]
    spatial_std: float
    firing_level: float
    above_level: float

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


@float32_as("ieee")
@torch.no_grad()
def gate_statistics(model: Any, batches: Iterable[Tensor]) -> GateStatistics:
    """Scale and variance of a network's gate.

    Args:
        model: The network, in eval mode.
        batches: Images ``(B, C, H, W)`` of one size, on its device.

    Raises:
        ValueError: The network has no gate, or there are no images.
    """
    encoder = _gated(model)
    behind: dict[str, Any] = {
        name: float(value.mean()) for name, value in learned_values(getattr(model, "lif", None)).items()
    }
    level = firing_level(dataclasses.replace(encoder.spec, **behind), encoder.num_steps)
    sums = {name: list[Tensor]() for name in AXES}
    moments = torch.zeros(3, dtype=torch.float64)  # mean, mean square, share above the level
    temporal, spatial, drawn, images = list[Tensor](), torch.zeros(2, dtype=torch.float64), list[Tensor](), 0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        with record_spikes(model) as recording:
            model.forward_intermediates(batch, indices=[0], stop_early=True, intermediates_only=True)
        gate = recording.gate.double().cpu()  # type: ignore[union-attr]  # [B, T, C, H, W]
        count = len(gate)
        images += count
        for name, kept in AXES.items():
            part = gate.mean([axis for axis in range(5) if axis not in kept])
            sums[name].append(part if name == "images" else part * count)
        moments += torch.stack([gate.mean(), gate.square().mean(), (gate > level).double().mean()]) * count
        temporal.append(recording.scores["temporal"].double().cpu())
        score = recording.scores["spatial"].double().cpu()
        spatial += torch.stack([score.mean(), score.square().mean()]) * count
        flat = gate.flatten()
        drawn.append(flat[torch.randint(len(flat), (min(len(flat), 100_000),), generator=generator)])
    if not images:
        raise ValueError("expected at least one image, got none: check the data")
    mean, square, above = (moments / images).tolist()
    variance = max(square - mean**2, 0.0)
    marginals = {"images": torch.cat(sums["images"])}
    marginals |= {name: torch.stack(parts).sum(0) / images for name, parts in sums.items() if name != "images"}
    explained = {name: float(part.var(correction=0)) for name, part in marginals.items()}
    explained["interactions"] = max(variance - sum(explained.values()), 0.0)
    sample = torch.cat(drawn)[:_DRAWN]
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    spatial_mean, spatial_square = (spatial / images).tolist()
    return GateStatistics(
        images=images,
        mean=mean,
        std=math.sqrt(variance),
        quantiles=dict(zip(QUANTILES, torch.quantile(sample, levels).tolist(), strict=True)),
        shares={name: part / variance if variance else 0.0 for name, part in explained.items()},
        temporal=tuple(torch.cat(temporal).mean(0).tolist()),
        spatial_std=math.sqrt(max(spatial_square - spatial_mean**2, 0.0)),
        firing_level=level,
        above_level=above,
    )


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
