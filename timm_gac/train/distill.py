"""Distillation: a trained teacher, and the loss that draws a student's answers towards its own.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.labels import match_labels
from ..hub.open import OpenedNetwork, open_network, public_name
from .recipes import Recipe


class Teacher(nn.Module):
    """A trained network that answers without gradients, in eval mode whatever happens around it.

    Args:
        network: The network.
        preprocessing: Its pretrained_cfg, with the ``mean`` and ``std`` that it was trained with.
        given: That of the student: its images are normalised by these, and anew for the teacher where they differ.
        about: Description for the files of a run.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, preprocessing: Mapping[str, Any], given: Mapping[str, Any], about: dict[str, Any]
    ) -> None:
        super().__init__()
        self.network, self.about = network.requires_grad_(False), about
        self.eval()
        own, theirs = ([tuple(map(float, cfg[name])) for name in ("mean", "std")] for cfg in (preprocessing, given))
        self.renormalises = own != theirs
        (mean, std), (given_mean, given_std) = (torch.tensor(values, dtype=torch.float64) for values in (own, theirs))
        self.register_buffer("scale", (given_std / std).float()[:, None, None], persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).float()[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` in float32 of the student's images ``(B, C, H, W)``."""
        if self.renormalises:
            images = images * self.scale + self.shift
        logits: Tensor = self.network(images)
        return logits.float()


def open_teacher(
    recipe: Recipe, given: Mapping[str, Any], num_classes: int, label_names: Sequence[str], device: torch.device
) -> Teacher | None:
    """The teacher of a recipe, on the device; None where it has none. Random numbers go on as if there were none.

    Args:
        recipe: The recipe.
        given: ``pretrained_cfg`` of the student, with the ``input_size`` of the training images.
        num_classes: Classes of the training data.
        label_names: Their names; () where unknown.
        device: Device of the run.

    Raises:
        ValueError: There is no such network, its weights are random, or it has other classes or input channels.
    """
    if recipe.teacher is None:
        return None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        opened = open_network(recipe.teacher).require_trained()
    network, channels = opened.network, given["input_size"][0]
    for what, found, wanted in (
        ("classes", network.num_classes, num_classes),
        ("input channels", network.in_chans, channels),
    ):
        if found != wanted:
            raise ValueError(
                f"expected a teacher for the {wanted} {what} of the training data, got {recipe.teacher!r} for {found}: "
                "give one that was trained on such data"
            )
    order = match_labels(label_names, opened.label_names, "the training data, as the teacher knows them")
    if order is not None and order != sorted(order):
        raise ValueError(
            f"expected a teacher with the classes of the training data in their order, got {recipe.teacher!r} with "
            "another order: give one that was trained on this data"
        )
    about = _describe(opened)
    teacher = Teacher(network, network.pretrained_cfg, given, about).to(device)
    return teacher.to(memory_format=torch.channels_last) if recipe.channels_last else teacher


def _describe(opened: OpenedNetwork) -> dict[str, Any]:
    """What a reader wants to know of a teacher, ready for JSON; without a path of this machine."""
    network = opened.network
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    steps = {"num_steps": network.num_steps} if hasattr(network, "spec") else {}  # an ANN has none
    return {
        "name": public_name(opened.name),
        "architecture": network.pretrained_cfg["architecture"],
        **steps,
        "content": digest.hexdigest()[:16],
    }


def check_same_teacher(before: Any, teacher: Teacher | None) -> None:
    """Refuse to resume a run with a teacher of other weights than it began with.

    Args:
        before: Its description in a checkpoint; None where there was none.
        teacher: The teacher at hand.

    Raises:
        ValueError: Their weights differ.
    """
    if isinstance(before, dict) and teacher is not None and before.get("content") != teacher.about["content"]:
        raise ValueError(
            f"expected the teacher that this run began with, got {teacher.about['name']} with other weights "
            f"({before.get('content')} became {teacher.about['content']}): give the same ones, or begin anew in "
            "another --out"
        )


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of the classes' probabilities at temperature T, the mean over samples and steps.

    The factor keeps its gradient's size when T changes, as that of the divergence falls with 1/T^2.

    Args:
        logits: Of the student, ``(B, classes)`` or of each step ``(B, steps, classes)``, in float32.
        teacher: Logits of the teacher, ``(B, classes)``, for all steps alike.
        temperature: T, by which both logits are divided.
    """
    steps = logits if logits.ndim == 3 else logits[:, None]
    student = F.log_softmax(steps / temperature, -1)
    target = F.log_softmax(teacher / temperature, -1)[:, None].expand_as(student)
    return temperature**2 * F.kl_div(student, target, reduction="sum", log_target=True) / student[..., 0].numel()
