"""Loops of a few lines of PyTorch: a step as one CUDA graph, the plain loop, and short epochs of a compiled network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ...runtime.dtypes import autocast
from ...runtime.graphs import GraphedStep
from ..harness import Row
from ..networks import COMPILERS, Unavailable
from ..steps import make_step, synchronize

LR = 1e-6  # so small that weights, and with them firing rates, stay nearly the same while a loop is timed
EPOCH = 4  # full batches of a short epoch, before its smaller one
# What a way that compiles gives to torch.compile.
COMPILING: dict[str, dict[str, Any]] = {way: {"options": options} for way, options in COMPILERS.items()}
COMPILING["reduce_overhead"] = {"mode": "reduce-overhead"}

Batches = Iterable[Any]


@dataclass(frozen=True)
class Settings:
    """Where and how a loop computes; ``batch`` is images a step."""

    device: torch.device
    precision: str
    batch: int


def graphed_step(network: nn.Module, batches: Batches, settings: Settings) -> None:
    """Each step, forward, backward and SGD, as one CUDA graph."""
    if settings.device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    graphed = GraphedStep(_step(network, settings))
    try:
        for images, labels in batches:
            graphed(images, labels)
    finally:
        graphed.release()


def plain_loop(network: nn.Module, batches: Batches, settings: Settings) -> None:
    """Forward under autocast, backward, fused SGD."""
    step = _step(network, settings)
    for images, labels in batches:
        step(images, labels)


def _step(network: nn.Module, settings: Settings) -> Callable[..., Tensor]:
    return make_step(network, "train", settings.precision, settings.device, compiled=False)


def choose_algorithms(network: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> None:
    """Do a step, in which cuDNN searches for its algorithms, with workspaces that are no part of a loop's memory."""
    _step(network, settings)(images, labels)
    network.zero_grad(set_to_none=True)


def short_epochs(
    network: nn.Module, images: Tensor, labels: Tensor, settings: Settings, epochs: int, row: Row | None = None
) -> Row:
    """Train a compiled network over short epochs with a smaller last batch, and evaluate after each.

    Args:
        network: What torch.compile returned.
        images: One batch ``(B, C, H, W)``.
        labels: Its labels ``(B,)``.
        settings: Of the loop.
        epochs: How many.
        row: Filled as it comes, so that it has what is known where a compilation does not end; a new one where None.

    Returns:
        ``compile_s``, seconds of the first training step; ``epochs_s`` of all that follows, with the compilation of
        evaluation and of the smaller batch; ``graphs`` that Dynamo traced in all; ``graph_breaks``; ``recompiles``,
        graphs other than those of the first training step and the first evaluation; ``late_recompiles``, those after
        the first epoch.
    """
    row = {} if row is None else row
    counters.clear()
    step = _step(network, settings)
    smaller = max(1, settings.batch * 5 // 8)
    row["compile_s"] = _timed(lambda: step(images, labels), settings.device)
    expected, begun = _graphs(), time.perf_counter()
    for epoch in range(epochs):
        network.train()
        for _ in range(EPOCH):
            step(images, labels)
        step(images[:smaller], labels[:smaller])
        network.eval()
        before = _graphs()
        with torch.no_grad(), autocast(settings.device, settings.precision):
            network(images)
        if epoch == 0:
            expected += _graphs() - before
            first_epoch = _graphs()
        synchronize(settings.device)
        row |= {"epochs_s": time.perf_counter() - begun, "graphs": _graphs(), "recompiles": _graphs() - expected}
        row |= {"graph_breaks": sum(counters["graph_break"].values()), "late_recompiles": _graphs() - first_epoch}
    network.train()
    return row


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _timed(function: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begun
