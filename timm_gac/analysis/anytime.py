"""Answers at any time step: accuracy and energy after t <= T steps from one pass, and early exit by confidence.

A network's answer after t steps is the mean of the logits of these steps. Neurons look only back in time, so with a
static image nothing that comes later changes it. (With event frames gated attention coding pools all frames before the
first step: there early exit must wait for the last frame, and saves only what follows the encoder.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..energy import EnergyCosts, EnergyMeter, EnergyReport
from ..inference.early_exit import check_confidence, first_confident_step, mean_logits
from ..runtime.dtypes import computing
from ..runtime.figures import hide_frame, new_figure

CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class ExitPoint:
    """What early exit at one confidence gives on a set of images.

    Attributes:
        confidence: Probability of the likeliest class at which a sample stops.
        top1: Fraction of right answers.
        mean_steps: Steps a sample runs.
        shares: Fraction of samples that stop after 1 to T steps.
        energy_mj: Mean energy of a sample by convention; one that ran t steps costs what t steps cost on average.
    """

    confidence: float
    top1: float
    mean_steps: float
    shares: tuple[float, ...]
    energy_mj: dict[str, float]


@dataclass(frozen=True)
class AnytimeReport:
    """Accuracy and energy of a network's answer after 1 to T steps.

    Attributes:
        energy: What was counted in the same pass.
        top1: Fraction of right answers after 1 to T steps.
        confidence: Mean probability of the likeliest class after 1 to T steps.
        energy_mj: Energy of an answer after 1 to T steps, per image, by convention.
        exits: Early exit at several confidences.
    """

    energy: EnergyReport
    top1: tuple[float, ...]
    confidence: tuple[float, ...]
    energy_mj: dict[str, tuple[float, ...]]
    exits: tuple[ExitPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            **{name: getattr(self.energy, name) for name in ("model", "weights", "trained", "num_steps", "images")},
            "costs": asdict(self.energy.costs),
            "ann_mj": self.energy.ann_mj,
            "top1_by_step": self.top1,
            "confidence_by_step": self.confidence,
            "energy_by_step_mj": self.energy_mj,
            "early_exit": [asdict(point) for point in self.exits],
        }


@torch.no_grad()
def measure_anytime(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    confidences: Sequence[float] = CONFIDENCES,
    costs: EnergyCosts | str = "45nm-float32",
    weights: str = "",
    amp_dtype: torch.dtype | None = None,
    trained: bool | None = None,
) -> AnytimeReport:
    """Accuracy and energy at every t <= T, and of early exit, from one pass over labelled images.

    Args:
        model: With ``forward_steps``, in eval mode.
        batches: Images (B, C, H, W) and labels (B,), on the model's device.
        confidences: Confidences at which early exit stops.
        costs: Cost table, or its name in `timm_gac.energy.COSTS`.
        weights: Where the weights are from, to be kept with the figures.
        amp_dtype: Autocast to this dtype; float32 where None, without TensorFloat-32.
        trained: Whether the weights are trained, to be kept too; None where that is not known.

    Raises:
        ValueError: There are no images, no per-step logits, or a confidence is out of range.
    """
    if not hasattr(model, "forward_steps"):
        raise ValueError(f"expected a model with forward_steps, got {type(model).__name__}: use one of this package")
    for confidence in confidences:
        check_confidence(confidence)
    hits, confidences_after, meter = [], [], EnergyMeter(model)
    with meter:
        for images, labels in batches:
            with computing(images.device, amp_dtype):
                logits = model.forward_steps(images)
            answers = mean_logits(logits)
            hits.append((answers.argmax(-1) == labels[:, None]).cpu())
            confidences_after.append(answers.softmax(-1).amax(-1).cpu())
    report = meter.report(costs, weights, trained)
    right, probability = torch.cat(hits), torch.cat(confidences_after)  # [images, T]
    if not bool(probability.isfinite().all()):
        raise ValueError("expected finite logits, got NaN or infinity: look for it in the weights and the images")
    by_step = {name: report.energy_by_step(name) for name in report.totals() if name != "ann"}
    exits = []
    for confidence in confidences:
        steps = first_confident_step(probability, confidence)
        shares = torch.bincount(steps - 1, minlength=report.num_steps).double() / len(steps)
        exits.append(
            ExitPoint(
                confidence=confidence,
                top1=right[torch.arange(len(steps)), steps - 1].double().mean().item(),
                mean_steps=steps.double().mean().item(),
                shares=tuple(shares.tolist()),
                energy_mj={name: float(shares @ torch.tensor(e).double()) for name, e in by_step.items()},
            )
        )
    return AnytimeReport(
        energy=report,
        top1=tuple(right.double().mean(0).tolist()),
        confidence=tuple(probability.double().mean(0).tolist()),
        energy_mj=by_step,
        exits=tuple(exits),
    )


def write_anytime_chart(reports: Sequence[AnytimeReport], file: Path, convention: str = "strict") -> None:
    """Draw accuracy against energy: after 1 to T steps as a solid line, early exit as a dotted one.

    Args:
        reports: One or more networks, measured on the same images.
        file: PNG to write.
        convention: Convention of the energies.
    """
    figure = new_figure(7.2, 4.6, dpi=120)
    axis = figure.subplots()
    for report, colour in zip(reports, ("#2a6f97", "#b5651d", "#0b6e4f", "#b04a5a"), strict=False):
        energy = report.energy_mj[convention]
        name = f"{report.energy.model}, T={report.energy.num_steps}"
        top1 = [100 * value for value in report.top1]
        axis.plot(energy, top1, marker="o", color=colour, label=f"{name}: after t steps")
        for step, (x, y) in enumerate(zip(energy, top1, strict=True), 1):
            axis.annotate(f"t={step}", (x, y), (5, -12), textcoords="offset points", fontsize=9, color=colour)
        axis.plot(
            [point.energy_mj[convention] for point in report.exits],
            [100 * point.top1 for point in report.exits],
            marker="x",
            linestyle=":",
            color=colour,
            alpha=0.8,
            label=f"{name}: early exit",
        )
    axis.margins(x=0.09, y=0.09)
    axis.set(xlabel=f"mJ per image ({convention}, {reports[0].energy.costs.name})", ylabel="top-1 (%)")
    axis.grid(alpha=0.3)
    hide_frame(axis)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)  # where it hides no point
    axis.set_title(f"Answers at any time, {reports[0].energy.images:,} images", loc="left", fontsize=12)
    figure.savefig(file)
