"""Figures of an inspection, drawn for the width of a phone: few words, large letters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.figures import hide_frame, new_figure
from .record import BINS, HIGH, LOW, Inspection

WIDTH, DPI, FONT = 6.4, 130, 12
NEURONS = 24
QUIET, BUSY, ACTIVE = "#9aa5b1", "#b04a5a", "#2a6f97"


def draw_trains(axis: Any, trains: dict[str, Tensor]) -> None:
    """Dots for the spikes of each layer's neurons, layers from top to bottom, one column a time step.

    Args:
        axis: Axis of matplotlib.
        trains: By layer, zero or not, ``(columns, neurons)``: the neurons to draw.
    """
    from matplotlib import colormaps

    colours, top, labels = colormaps["viridis"], 0.0, []
    for index, (name, fired) in enumerate(trains.items()):
        when, which = fired.nonzero(as_tuple=True)
        colour = colours(0.88 * index / max(1, len(trains) - 1))
        axis.hlines((top + which).numpy(), (when + 0.1).numpy(), (when + 0.9).numpy(), linewidth=1.2, color=colour)
        labels.append((top + fired.shape[1] / 2, name))
        top += fired.shape[1] + 6
    axis.set(ylim=(top - 3, -3))
    axis.set_yticks([place for place, _ in labels], [name for _, name in labels])


def choose_trains(spikes: Tensor, count: int = NEURONS) -> Tensor:
    """Spikes of some neurons for a raster: spread evenly over those that fire, then over silent ones if these are few.

    Neurons that fire at every step are among them, in proportion: on a static image those that fire at the first step
    often do, and a raster of changing neurons alone would show an empty first step.

    Args:
        spikes: ``(T, C, H, W)``, zero or not.
        count: Number of neurons.

    Returns:
        bool ``(T, neurons)``.
    """
    trains = spikes.flatten(1) != 0
    active = trains.any(0)
    firing, silent = active.nonzero()[:, 0], (~active).nonzero()[:, 0]
    chosen = _spread(firing, count)
    return trains[:, torch.cat((chosen, _spread(silent, count - len(chosen)))).sort().values]


def _spread(indices: Tensor, count: int) -> Tensor:
    count = min(count, len(indices))
    return indices[torch.arange(count) * len(indices) // max(1, count)]


def _figure(height: float) -> Any:
    return new_figure(WIDTH, height, dpi=DPI)


def plain_axis(axis: Any, size: float = FONT - 1) -> None:
    """Draw neither frame nor tick marks, and labels of this size."""
    axis.tick_params(length=0, labelsize=size)
    for side in axis.spines.values():
        side.set_visible(False)


def _steps_on(axis: Any, steps: int, offset: float = 0.0) -> None:
    axis.set_xticks([step + offset for step in range(steps)], [str(step + 1) for step in range(steps)])
    axis.set_xlabel("time step", fontsize=FONT)


def draw_answer(inspection: Inspection, count: int = 5) -> Any:
    """The picture beside the likeliest classes after each step."""
    count = min(count, inspection.scores.shape[1])
    chosen = inspection.scores[-1].topk(count).indices
    names = [inspection.label_names[i] if inspection.label_names else f"class {i}" for i in chosen.tolist()]
    figure = _figure(3.0)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    left.imshow(inspection.picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    left.set_axis_off()
    values = inspection.scores[:, chosen].T
    right.imshow(values.numpy(), cmap="Greens", vmin=0, vmax=1, aspect="auto")
    for (row, step), value in zip(
        torch.cartesian_prod(*map(torch.arange, values.shape)), values.flatten(), strict=True
    ):
        colour = "white" if value > 0.6 else "black"
        right.text(step, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=FONT - 1)
    right.set_yticks(range(count), [name if len(name) < 17 else name[:15] + "…" for name in names])
    _steps_on(right, len(inspection.scores))
    right.set_xlabel("after time step", fontsize=FONT)
    plain_axis(right)
    return figure


def _overlay(axis: Any, inspection: Inspection, values: Tensor, colours: str, low: float, high: float) -> Any:
    """A heat map over the picture in grey, both at the picture's size."""
    height, width = inspection.picture.shape[:2]
    grown = F.interpolate(values[None, None], size=(height, width), mode="nearest")[0, 0]
    axis.imshow(inspection.picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    image = axis.imshow(grown.numpy(), cmap=colours, vmin=low, vmax=high, alpha=0.62, interpolation="nearest")
    axis.set_axis_off()
    return image


def _limits(values: Tensor, least: float) -> tuple[float, float]:
    """Range of colours, wide enough that a flat map looks flat and not like noise."""
    low, high = values.min().item(), values.max().item()
    middle, reach = (low + high) / 2, max(least, (high - low) / 2)
    return middle - reach, middle + reach


def draw_gate(inspection: Inspection) -> Any:
    """Scores of both attentions, then the gate and the gated spikes over the picture at each step; None without."""
    if inspection.temporal is None or inspection.spatial is None or inspection.gate is None:
        return None
    steps = inspection.num_steps
    columns = min(4, steps)
    rows = -(-steps // columns)
    figure = _figure(2.7 + 2 * (0.55 + 1.5 * rows))
    parts = figure.subfigures(3, 1, height_ratios=(2.7, 0.55 + 1.5 * rows, 0.55 + 1.5 * rows))
    left, right = parts[0].subplots(1, 2)
    spatial = inspection.spatial.mean(0)
    image = _overlay(left, inspection, spatial, "magma", *_limits(spatial, 0.01))
    parts[0].colorbar(image, ax=left, fraction=0.05).ax.tick_params(labelsize=FONT - 3)
    left.set_title("spatial score n,\nmean over channels", fontsize=FONT)
    right.bar(range(steps), inspection.temporal.tolist(), color=ACTIVE, width=0.6)
    right.axhline(0, color="0.4", linewidth=0.8)
    right.set_title("temporal score m\n", fontsize=FONT)
    _steps_on(right, steps)
    right.tick_params(labelsize=FONT - 2)
    hide_frame(right)
    maps = (
        ("gate = sigmoid(m·n), mean over channels", inspection.gate, "magma"),
        ("gated spikes, mean over channels", inspection.coded, "viridis"),
    )
    for part, (title, values, colours) in zip(parts[1:], maps, strict=True):
        axes = part.subplots(rows, columns, squeeze=False)
        limits = _limits(values, 0.01)
        for index, axis in enumerate(axes.flat):
            axis.set_axis_off()
            if index < steps:
                image = _overlay(axis, inspection, values[index], colours, *limits)
                axis.set_title(f"t={index + 1}: {values[index].mean():.3f}", fontsize=FONT - 1)
        part.colorbar(image, ax=axes, fraction=0.03, format="%.2f").ax.tick_params(labelsize=FONT - 3)
        part.suptitle(title, fontsize=FONT)
    return figure


def draw_rates(inspection: Inspection) -> Any:
    """Firing rate of each layer at each step, as a heat map."""
    rates = torch.tensor([layer.step_rates for layer in inspection.layers], dtype=torch.float64)
    figure = _figure(1.0 + 0.3 * len(rates))
    axis = figure.subplots()
    top = max(rates.max().item(), 1e-3)
    axis.imshow(rates.numpy(), cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for row, values in enumerate(rates.tolist()):
        for step, value in enumerate(values):
            colour = "black" if value > 0.6 * top else "white"
            axis.text(step, row, f"{value:.1%}", ha="center", va="center", color=colour, fontsize=FONT - 2)
    axis.set_yticks(range(len(rates)), [layer.name for layer in inspection.layers])
    _steps_on(axis, inspection.num_steps)
    plain_axis(axis, FONT - 2)
    return figure


def draw_raster(inspection: Inspection) -> Any:
    """Spikes of some neurons of each layer over time, for the picture that is drawn."""
    figure = _figure(0.9 + 0.55 * len(inspection.layers))
    axis = figure.subplots()
    draw_trains(axis, {layer.name: choose_trains(layer.spikes) for layer in inspection.layers})
    axis.set_xlim(0, inspection.num_steps)
    for step in range(1, inspection.num_steps):
        axis.axvline(step, color="0.85", linewidth=1)
    _steps_on(axis, inspection.num_steps, 0.5)
    plain_axis(axis, FONT - 2)
    return figure


def draw_membranes(inspection: Inspection) -> Any:
    """Histogram of the membrane potential of each layer before the reset; what is right of the threshold fires."""
    columns = 3
    rows = -(-len(inspection.layers) // columns)
    figure = _figure(0.7 + 1.25 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = torch.linspace(LOW, HIGH, BINS + 1)
    above = round((1 - LOW) / (HIGH - LOW) * BINS)  # the first bin above the threshold
    for axis, layer in zip(axes.flat, inspection.layers, strict=False):
        axis.stairs(layer.histogram[:above].numpy(), edges[: above + 1].numpy(), fill=True, color=ACTIVE)
        axis.stairs(layer.histogram[above:].numpy(), edges[above:].numpy(), fill=True, color=BUSY)
        axis.axvline(1, color="black", linewidth=0.9)
        axis.set_title(f"{layer.name}  {layer.rate:.1%}", fontsize=FONT - 3, pad=2)
        axis.set_yscale("log")
        axis.set(xlim=(LOW, HIGH), ylim=(1e-5, 1.5))
        axis.tick_params(labelsize=FONT - 4)
        hide_frame(axis)
    for axis in axes.flat[len(inspection.layers) :]:
        axis.set_axis_off()
    figure.supxlabel("membrane before the reset / threshold", fontsize=FONT)
    figure.supylabel("share of neuron-steps", fontsize=FONT)
    return figure


def draw_health(inspection: Inspection) -> Any:
    """Shares of dead, active and saturated neurons of each layer."""
    figure = _figure(1.1 + 0.3 * len(inspection.layers))
    axis = figure.subplots()
    for row, layer in enumerate(inspection.layers):
        left = 0.0
        active = 1.0 - layer.dead - layer.saturated
        parts = ((layer.dead, QUIET, "dead"), (active, ACTIVE, "active"), (layer.saturated, BUSY, "saturated"))
        for share, colour, label in parts:
            axis.barh(row, share, left=left, color=colour, height=0.75, label=label if row == 0 else None)
            left += share
        if layer.dead >= 0.08:
            axis.text(0.01, row, f"{layer.dead:.0%}", va="center", fontsize=FONT - 2, color="black")
        if layer.saturated >= 0.08:
            axis.text(0.99, row, f"{layer.saturated:.0%}", va="center", ha="right", fontsize=FONT - 2, color="white")
    axis.set_yticks(range(len(inspection.layers)), [layer.name for layer in inspection.layers])
    axis.set_xlim(0, 1)
    axis.set_ylim(len(inspection.layers) - 0.4, -0.6)
    axis.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    on = "this one image" if inspection.images == 1 else f"these {inspection.images:,} images"
    axis.set_xlabel(f"share of neurons; dead: silent on {on}", fontsize=FONT)
    plain_axis(axis, FONT - 2)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=FONT - 1)
    return figure
