"""What the neurons of a network learned: decay and threshold of each layer beside where they began."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ...runtime.figures import hide_frame, new_figure
from .figures import ACTIVE, BUSY, DPI, FONT, WIDTH
from .record import Inspection, LayerActivity

# Columns of neurons.csv; ``channel`` is empty for a layer of one decay and one threshold.
COLUMNS = ("layer", "channel", "decay", "threshold", "initial_decay", "initial_threshold")
COLOURS = {"decay": ACTIVE, "threshold": BUSY}
GAP = 0.6  # between stages, in rows
LEAST = 0.01  # half of an axis, at least: neurons that have hardly learned look so


def has_learned(inspection: Inspection) -> bool:
    """Whether a layer of the network has learned its decay and threshold."""
    return any(layer.values.learned for layer in inspection.layers)


def neuron_rows(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Rows of neurons.csv: one a layer, or one a channel where each channel has learned its own."""
    for layer in inspection.layers:
        values, initial = layer.values, layer.values.initial
        one = len(values.decay) == 1
        pairs = zip(values.decay.tolist(), values.threshold.tolist(), strict=True)
        for channel, (decay, threshold) in enumerate(pairs):
            cells = (layer.name, "" if one else channel, f"{decay:.6g}", f"{threshold:.6g}")
            yield dict(zip(COLUMNS, (*cells, initial.decay, initial.threshold), strict=True))


def draw_neurons(inspection: Inspection) -> Any:
    """Decay and threshold of the layers from top to bottom, grouped by stage; None where nothing was learned.

    One a layer is a dot at the end of the way that it went from its initial value. One a channel is a box from the
    first to the third quartile with the median in it, on a line from the smallest to the largest. Numbers at the right
    are the values, or medians.
    """
    if not has_learned(inspection):
        return None
    layers = inspection.layers
    rows, bands = _place([layer.name for layer in layers])
    figure = new_figure(WIDTH, 1.25 + 0.25 * (rows[-1] + 1), dpi=DPI)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, parameter in zip(axes, COLOURS, strict=True):
        for low, high in bands:
            axis.axhspan(low, high, color="0.955", linewidth=0)
        _draw_initial(axis, layers, rows, parameter)
        for layer, row in zip(layers, rows, strict=True):
            _draw_layer(axis, layer, row, parameter)
        axis.set_title(parameter, fontsize=FONT, color=COLOURS[parameter])
        axis.tick_params(axis="x", labelsize=FONT - 2)
        axis.tick_params(axis="y", length=0, labelsize=FONT - 2)
        axis.set_xlim(_limits(layers, parameter))
        axis.locator_params(axis="x", nbins=4)
        hide_frame(axis)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(rows, [layer.name for layer in layers])
    axes[0].set_ylim(rows[-1] + 0.7, -0.7)
    marks = _legend({len(layer.values.decay) > 1 for layer in layers})
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=FONT - 2)
    return figure


def _place(names: Sequence[str]) -> tuple[list[float], list[tuple[float, float]]]:
    """The row of each layer, with a gap between stages, and the band behind each stage.

    A stage is what stands before the first point of a name; layers without one, such as the encoder, are a group.
    """
    rows: list[float] = []
    bands, top = [], 0.0
    for _, group in groupby(names, key=lambda name: name.partition(".")[0] if "." in name else ""):
        count = len(list(group))
        rows += [top + index for index in range(count)]
        bands.append((top - 0.6, top + count - 0.4))
        top += count + GAP
    return rows, bands


def _draw_initial(axis: Any, layers: Sequence[LayerActivity], rows: Sequence[float], parameter: str) -> None:
    """A dashed line through the initial values, one line where all layers began alike."""
    starts = [getattr(layer.values.initial, parameter) for layer in layers]
    edges = torch.tensor([rows[0] - 0.7, *[(a + b) / 2 for a, b in pairwise(rows)], rows[-1] + 0.7])
    axis.stairs(starts, edges.numpy(), orientation="horizontal", baseline=None, color="0.35", linestyle="--")


def _draw_layer(axis: Any, layer: LayerActivity, row: float, parameter: str) -> None:
    values: Tensor = getattr(layer.values, parameter)
    colour, median = COLOURS[parameter], values.double().quantile(0.5).item()
    if len(values) == 1:
        axis.hlines(row, getattr(layer.values.initial, parameter), median, color=colour, linewidth=1.6, alpha=0.5)
        axis.plot(median, row, "o", color=colour, markersize=6)
    else:
        least, first, third, most = values.double().quantile(torch.tensor([0, 0.25, 0.75, 1]).double()).tolist()
        axis.hlines(row, least, most, color=colour, linewidth=1.1)
        axis.barh(row, third - first, left=first, height=0.55, color=colour, alpha=0.5, linewidth=0)
        axis.vlines(median, row - 0.32, row + 0.32, color="black", linewidth=1.6)
    place = axis.get_yaxis_transform()
    axis.text(1.02, row, f"{median:.3f}", transform=place, va="center", fontsize=FONT - 3, color="0.25")


def _limits(layers: Sequence[LayerActivity], parameter: str) -> tuple[float, float]:
    """Range of an axis: all values and where they began, with a margin."""
    initial = torch.tensor([getattr(layer.values.initial, parameter) for layer in layers])
    shown = torch.cat([initial, *(getattr(layer.values, parameter) for layer in layers)])
    low, high = shown.min().item(), shown.max().item()
    middle, reach = (low + high) / 2, max(LEAST, 0.57 * (high - low))
    return middle - reach, middle + reach


def _legend(of_channels: set[bool]) -> list[Any]:
    """What the marks mean, of layers with one value (False) and with one a channel (True)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [Line2D([], [], color="0.35", linestyle="--", label="initial value")]
    if False in of_channels:
        marks.append(Line2D([], [], color="0.35", marker="o", alpha=0.8, label="learned"))
    if True in of_channels:
        marks += [
            Line2D([], [], color="0.35", linewidth=1.1, label="all channels"),
            Patch(color="0.35", alpha=0.5, linewidth=0, label="middle half"),
            Line2D([], [], color="black", linewidth=1.6, marker="|", linestyle="", markersize=11, label="median"),
        ]
    return marks
