"""Figures of the demonstration, drawn for the width of a phone: few words, large letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from analysis import Analysis, Network
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from timm_gac.analysis.inspect.figures import choose_trains

WIDTH, DPI, FONT = 6.4, 120, 13
NEURONS = 24
SPIKING, SPIKING_PALE, DENSE = "#2a6f97", "#8fb8d0", "#b5651d"


def draw(figure: Figure) -> np.ndarray:
    """A figure as pixels, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure in the one style of all of them."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plain(axis: Any) -> None:
    """No frame, no ticks."""
    axis.tick_params(length=0, labelsize=FONT - 1)
    for side in axis.spines.values():
        side.set_visible(False)


def classes(analysis: Analysis, labels: Sequence[str], count: int = 5) -> np.ndarray:
    """The likeliest classes after each time step, best first, with their probabilities."""
    probabilities = analysis.probabilities
    steps, count = len(probabilities), min(count, probabilities.shape[1])
    values, indices = probabilities.topk(count, dim=1)
    figure, axes = new_figure(0.9 + 0.62 * count)
    axis = axes[0, 0]
    axis.imshow(values.T, cmap="Greens", vmin=0, vmax=1.15, aspect="auto")
    size = FONT if steps <= 4 else FONT - 3
    for step in range(steps):
        for place in range(count):
            value, name = values[step, place].item(), labels[int(indices[step, place])]
            name = name if len(name) <= 44 // steps else name[: 44 // steps - 1] + "…"
            colour = "white" if value > 0.7 else "black"
            axis.text(step, place, f"{name}\n{value:.0%}", ha="center", va="center", fontsize=size, color=colour)
    axis.set_xticks(range(steps), [str(step + 1) for step in range(steps)])
    axis.set_yticks(range(count), [f"{place + 1}." for place in range(count)])
    axis.set_xlabel("after time step", fontsize=FONT)
    plain(axis)
    return draw(figure)


def raster(analysis: Analysis) -> np.ndarray:
    """Spikes of some neurons of each layer over time, spread over those that fire, and each layer's rate."""
    figure, axes = new_figure(
        1.0 + 0.7 * len(analysis.spikes), 1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 1.1]}
    )
    trains_axis, rate_axis = axes[0]
    top, places, names = 0.0, [], []
    colours = colormaps["viridis"]
    for index, (name, spikes) in enumerate(analysis.spikes.items()):
        trains = choose_trains(spikes, NEURONS)  # (T, neurons)
        count = trains.shape[1]
        when, which = trains.nonzero(as_tuple=True)
        colour = colours(0.85 * index / max(1, len(analysis.spikes) - 1))
        trains_axis.hlines(top + which, when + 0.08, when + 0.92, linewidth=1.4, color=colour)
        rate = analysis.rates[name]
        rate_axis.barh(top + count / 2, rate, height=count * 0.8, color=colour)
        rate_axis.text(rate, top + count / 2, f" {rate:.1%}", va="center", fontsize=FONT - 2)
        places.append(top + count / 2)
        names.append(name)
        top += count + 5
    steps = len(analysis.steps)
    trains_axis.set(xlim=(0, steps), ylim=(top, -4))
    trains_axis.set_xticks([step + 0.5 for step in range(steps)], [str(step + 1) for step in range(steps)])
    trains_axis.set_yticks(places, names)
    trains_axis.set_xlabel("time step", fontsize=FONT)
    rate_axis.set_xlim(0, 1.6 * max([*analysis.rates.values(), 1e-3]))
    rate_axis.set_xticks([])
    rate_axis.set_xlabel("firing rate", fontsize=FONT)
    plain(trains_axis)
    plain(rate_axis)
    if steps > 1:
        for step in range(1, steps):
            trains_axis.axvline(step, color="0.88", linewidth=1)
    return draw(figure)


def gate(analysis: Analysis) -> np.ndarray | None:
    """What the network sees, and the encoder's gate at each time step; None with direct coding."""
    if analysis.gate is None:
        return None
    steps = len(analysis.gate)
    columns = min(3, steps + 1)
    rows = -(-(steps + 1) // columns)
    figure, axes = new_figure(2.35 * rows + 0.3, rows, columns)
    middle = (analysis.gate.max().item() + analysis.gate.min().item()) / 2
    reach = max(0.01, middle - analysis.gate.min().item())  # so that a flat gate looks flat, not like noise
    image = None
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index == 0:
            axis.imshow(analysis.prepared.squeeze(-1), cmap="gray", vmin=0, vmax=1)
            axis.set_title("input", fontsize=FONT)
        elif index <= steps:
            image = axis.imshow(analysis.gate[index - 1], cmap="magma", vmin=middle - reach, vmax=middle + reach)
            axis.set_title(f"t = {index}: {analysis.gate[index - 1].mean():.3f}", fontsize=FONT)
    decimals = 2 if reach > 0.02 else 3
    bar = figure.colorbar(image, ax=axes, fraction=0.05, format=f"%.{decimals}f")
    bar.set_ticks([middle - reach, middle, middle + reach])
    bar.ax.tick_params(labelsize=FONT - 2)
    return draw(figure)


def energy(analysis: Analysis) -> np.ndarray:
    """Estimated energy of this picture under two ways of counting, beside that of the same layers as an ANN."""
    bars = {"spiking, as\nthe paper counts": "paper", "spiking, strict": "strict", "same layers\nas an ANN": "ann"}
    values = [analysis.energy[name] for name in bars.values()]
    figure, axes = new_figure(2.5)
    axis = axes[0, 0]
    axis.barh(list(bars), values, color=[SPIKING_PALE, SPIKING, DENSE], height=0.62)
    for place, value in enumerate(values):
        share = "" if place == 2 else f" ({value / values[2]:.0%})"
        axis.text(value, place, f" {joule(value)}{share}", va="center", fontsize=FONT)
    axis.set_xlim(0, 1.45 * max(values))
    axis.set_xticks([])
    plain(axis)
    axis.tick_params(labelsize=FONT)
    return draw(figure)


def summary(analysis: Analysis, network: Network) -> str:
    """The result in two sentences."""
    probability, index = torch.topk(analysis.probabilities[-1], 1)
    spiking, dense = analysis.energy["strict"], analysis.energy["ann"]
    relation = f"{dense / spiking:.1f} times less" if spiking < dense else f"{spiking / dense:.1f} times more"
    name = network.labels[int(index)]
    return (
        f"**{name}** ({probability.item():.0%}) after {network.facts.num_steps} time steps. Estimated energy: "
        f"{joule(spiking)}, {relation} than the same layers as an ANN ({joule(dense)})."
    )


def joule(microjoule: float) -> str:
    """An energy in the unit that suits it."""
    return f"{microjoule / 1000:.3g} mJ" if microjoule >= 1000 else f"{microjoule:.3g} µJ"
