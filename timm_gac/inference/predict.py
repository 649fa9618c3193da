"""Predictions for images: the best classes with their probabilities, and the answer after each time step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.dtypes import computing
from .early_exit import forward_early_exit, mean_logits


@dataclass(frozen=True)
class Prediction:
    """A network's answer to one image.

    Attributes:
        classes: The best classes, the most probable first.
        names: Their names; the number as text where a class has none.
        confidences: Their softmax probabilities.
        per_step: Best class and its confidence by the mean logits of the first t steps, for each step that ran.
        steps: Time steps that ran; with early exit fewer than T.
        num_steps: T of the network.
    """

    classes: tuple[int, ...]
    names: tuple[str, ...]
    confidences: tuple[float, ...]
    per_step: tuple[tuple[int, float], ...]
    steps: int
    num_steps: int


@torch.no_grad()
def predict(
    model: Any,
    images: Tensor,
    *,
    top: int = 5,
    names: Sequence[str] = (),
    amp_dtype: torch.dtype | None = None,
    exit_at: float | None = None,
) -> list[Prediction]:
    """The answers of a network in eval mode.

    Args:
        model: With ``forward_steps``.
        images: (B, C, H, W), prepared as the network wants them, on its device.
        top: So many classes each, or as many as there are.
        names: Of the classes, in order; () where unknown.
        amp_dtype: Autocast to this dtype; float32 where None, without TensorFloat-32.
        exit_at: Early exit at this confidence, see `forward_early_exit`; None for all time steps.

    Raises:
        ValueError: The model has no per-step logits, ``top`` is below 1, or ``exit_at`` is outside (0, 1].
    """
    if not hasattr(model, "forward_steps"):
        raise ValueError(f"expected a model with forward_steps, got {type(model).__name__}: use one of this package")
    if top < 1:
        raise ValueError(f"expected top of at least 1, got {top}: raise it")
    with computing(images.device, amp_dtype):
        if exit_at is None:
            return answers(model.forward_steps(images), top, names)
        rows = forward_early_exit(model, images, exit_at)
    return [answers(row[None], top, names, model.num_steps)[0] for row in rows]


def answers(logits: Tensor, top: int, names: Sequence[str] = (), num_steps: int | None = None) -> list[Prediction]:
    """Predictions from logits of the steps that ran, (B, steps, classes), of a network of ``num_steps`` if more."""
    probabilities = mean_logits(logits.double()).softmax(-1)
    best, classes = probabilities[:, -1].topk(min(top, logits.shape[-1]))
    step_best, step_classes = probabilities.max(-1)
    rows = zip(classes.tolist(), best.tolist(), step_classes.tolist(), step_best.tolist(), strict=True)
    return [
        Prediction(
            classes=tuple(chosen),
            names=tuple(class_name(number, names) for number in chosen),
            confidences=tuple(confidences),
            per_step=tuple(zip(after, confidences_after, strict=True)),
            steps=len(after),
            num_steps=num_steps or len(after),
        )
        for chosen, confidences, after, confidences_after in rows
    ]


def class_name(number: int, names: Sequence[str]) -> str:
    """The name of a class; its number as text where it has none."""
    return names[number] if number < len(names) else str(number)
