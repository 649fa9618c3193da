"""What a learned gate does by epoch, with warnings about one that has become a constant.

Its two scores are multiplied, so they may grow together until all gates are 0 or 1; or both become 0, and all gates
0.5. Either way what the gate does no longer depends on the image, and it gets hardly any gradient to change that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.gate import GateStatistics, gate_statistics, has_learned_gate
from ..runtime.figures import hide_frame, new_figure
from ..runtime.modes import eval_mode
from .recipes import Recipe
from .runlog import History, read_history, write_history

GATE_IMAGES = 128  # the first that are evaluated: enough for shares, and few beside the whole set
SATURATED_ABOVE = 0.99  # share of values that are shut or open
CONSTANT_BELOW = 0.001  # deviation between images
COLUMNS = ["mean", "std", "shut", "open", "between_images", "largest_temporal", "spatial_std"]
_CHUNK = 16  # images at a time: four steps of 64 channels of 112x112 are 0.4 GB in float64


class FirstKept:
    """Batches of images and labels that are handed on; the first images are kept.

    Args:
        batches: The batches.
        count: How many images to keep at most.
    """

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
        self._kept = list[Tensor]()
        self._batches, self._missing = batches, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches:
            if self._missing:
                self._kept.append(images[: self._missing].clone())
                self._missing -= len(self._kept[-1])
            yield images, labels

    @property
    def images(self) -> Tensor | None:
        """A copy of those images; None before there were any, or with a count of 0."""
        return torch.cat(self._kept) if self._kept else None


def measure_gate(network: Any, images: Tensor | None) -> GateStatistics | None:
    """What a network's gate does on images, in float32 and eval mode; its modes are as before afterwards.

    Args:
        network: The network.
        images: On its device.

    Returns:
        None without a learned gate, or without two images to compare.
    """
    if images is None or len(images) < 2 or not has_learned_gate(network):
        return None
    with eval_mode(network):
        return gate_statistics(network, images.split(_CHUNK))


def watch_gate(out: Path, epoch: int, gate: GateStatistics | None, recipe: Recipe) -> list[str]:
    """Add an epoch to ``gate.csv``, draw ``gate.png``, and warn of a gate that has become a constant.

    Args:
        out: Folder of the run. Rows of this epoch and later ones are replaced, for a resumed run.
        epoch: Number of the epoch, from 1.
        gate: What the gate does; with None nothing is done.
        recipe: Recipe of the run, for what the warning advises.

    Returns:
        At most one warning, and none of a kind for which an earlier row of the table was reason enough.
    """
    if gate is None:
        return []
    file = out / "gate.csv"
    history = read_history(file, COLUMNS, epoch)
    told = {_trouble(values) for _, values in history}
    values = [getattr(gate, name) for name in COLUMNS]
    history.append((epoch, values))
    write_history(file, COLUMNS, history, ".6g")
    _draw(out / "gate.png", history)
    kind = _trouble(values)
    return [] if kind is None or kind in told else [_warning(kind, gate, recipe)]


def _trouble(values: list[float]) -> str | None:
    """``saturated``, ``constant`` or None, of a row's values."""
    row = dict(zip(COLUMNS, values, strict=True))
    if row["shut"] + row["open"] > SATURATED_ABOVE:
        return "saturated"
    return "constant" if row["std"] * math.sqrt(row["between_images"]) < CONSTANT_BELOW else None


def _warning(kind: str, gate: GateStatistics, recipe: Recipe) -> str:
    options = ["--gate-lr 0.1"] if recipe.gate_lr > 0.1 else []
    if kind == "saturated":
        what = (
            f"{gate.shut:.1%} of the gate is shut (under 0.01) and {gate.open:.1%} open (over 0.99), and "
            f"{gate.between_images:.1%} of its variance lies between images: it has become a mask and hardly learns"
        )
        options += ["--gate-decay 1"] if recipe.gate_decay < 1 else []
    else:
        deviation = gate.std * math.sqrt(gate.between_images)
        what = (
            f"the gate is the same for all images, {gate.mean:.2f} on average (it differs between them by "
            f"{deviation:.1g}, under {CONSTANT_BELOW}): it has become a constant"
        )
        options += ["--gate-decay 0"] if recipe.gate_decay > 0 else []
    options += ["--gate spatial"] if recipe.gate != "spatial" else []
    listed = f"{', '.join(options)}, or " if options else ""
    return f"warning: {what}; in a new run try {listed}direct coding, a model without gac_ in its name"


def _draw(file: Path, history: History) -> None:
    """Draw shares, the gate's mean among them, and the sizes of both scores, by epoch."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(9.2, 3.2, dpi=110)
    panels = figure.subplots(1, 2)
    # Of a mask mean and open are the same, and may be one half as shut is: so lines of different widths.
    lines = {
        "mean": (0, "#1f77b4", 4.5, "mean"),
        "open": (0, "#d62728", 2.6, "share open (over 0.99)"),
        "shut": (0, "#222222", 1.0, "share shut (under 0.01)"),
        "between_images": (0, "#2ca02c", 1.5, "share of variance between images"),
        "largest_temporal": (1, "#9467bd", 1.5, "temporal, largest"),
        "spatial_std": (1, "#ff7f0e", 1.5, "spatial, standard deviation"),
    }
    epochs = [epoch for epoch, _ in history]
    for name, (panel, colour, width, label) in lines.items():
        values = [row[COLUMNS.index(name)] for _, row in history]
        if panel and not any(values):  # a score that the gate does without: 0 has no place on a logarithmic axis
            continue
        panels[panel].plot(epochs, values, marker=".", color=colour, linewidth=width, label=label)
    panels[0].set(ylim=(-0.03, 1.03))
    panels[1].set(yscale="log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=20))  # 1, 3, 10, 30, ...
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[1].yaxis.set_minor_locator(NullLocator())
    for axis, title in zip(panels, ("Gate", "Scores, without their sign"), strict=True):
        axis.set(xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    hide_frame(*panels)
    figure.savefig(file)
