"""Charts of benchmark rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..runtime.figures import hide_frame, new_figure

# What charts call the networks of a benchmark; rows have the short names.
_NAMES = {
    "timm_gac_packed": "timm_gac, spikes packed",
    "timm_gac_8bit": "timm_gac, training in 8 bits",
    "timm_gac_fused": "timm_gac, norms folded",
    "timm_gac_int8": "timm_gac, 8-bit weights",
    "ann": "ANN, T passes",
    "convolutions": "the convolutions alone",
    "spikingjelly": "SpikingJelly",
    "spikingjelly_memopt": "SpikingJelly, memopt",
    "loop": "loop over time",
    "published": "published algorithm",
}

Groups = dict[str, dict[str, float]]  # label of a group, name of a series, value
Curves = dict[str, dict[int, float]]  # provider, number of time steps T, milliseconds


def bar_chart(path: Path, panels: dict[str, Groups], *, title: str, value: str, limit: float) -> None:
    """Write a PNG of grouped horizontal bars.

    Args:
        path: The PNG file.
        panels: Panel title to group label to series name to value.
        title: Title of the figure.
        value: Label of the value axis.
        limit: A reference value, drawn as a dotted line.
    """
    from matplotlib.patches import Patch

    series = list(dict.fromkeys(name for groups in panels.values() for bars in groups.values() for name in bars))
    colours = dict.fromkeys(series, "#333333")
    colours |= dict(zip(series, ("#0b6e4f", "#9aa5b1", "#e0a458", "#b04a5a", "#5b7db1"), strict=False))
    heights = [sum(len(bars) + 0.7 for bars in groups.values()) for groups in panels.values()]
    # Two panels side by side, as tall as the taller one.
    lines = [max(heights[first : first + 2]) for first in range(0, len(heights), 2)]
    figure = new_figure(12, 1.2 + 0.19 * sum(lines) + 0.5 * len(lines))
    axes = figure.subplots(len(lines), 2, sharex=True, squeeze=False, height_ratios=lines).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, groups) in zip(axes, panels.items(), strict=False):
        _draw_groups(axis, groups, colours, limit)
        axis.set_title(name, fontsize=9, loc="left")
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel(value, fontsize=8)
        hide_frame(axis)
    figure.suptitle(title, fontsize=10)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(series)), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_groups(axis: Any, groups: Groups, colours: dict[str, str], limit: float) -> None:
    """Draw the bars of one panel of `bar_chart`, group below group."""
    position, ticks = 0.0, []
    for bars in groups.values():
        ticks.append(position + (len(bars) - 1) / 2)
        for label, number in bars.items():
            axis.barh(position, number, height=0.9, color=colours[label])
            inside = number > 0.2 * limit
            style = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": "black"}
            axis.text(number, position, f" {number:.2f} ", va="center", fontsize=7, **style)
            position += 1
        position += 0.7
    axis.set_yticks(ticks, list(groups), fontsize=8)
    axis.set_ylim(position - 0.7, -0.7)
    axis.axvline(limit, color="black", linewidth=0.8, linestyle=":")


def throughput_chart(
    path: Path,
    bars: Groups,
    curves: dict[str, Curves],
    *,
    title: str,
) -> None:
    """Write a PNG of the throughput of networks, one column for each panel.

    Args:
        path: The PNG file.
        bars: Panel title to provider to images a second; drawn from fast to slow.
        curves: Panel title to provider to number of time steps T to milliseconds per time step; drawn below the bars.
        title: Title of the figure.
    """
    height = 1.2 + 0.27 * max(len(panel) for panel in bars.values())
    heights = [height, 3.6][: 2 if curves else 1]
    figure = new_figure(6.2 * len(bars), sum(heights) + 0.4)
    axes = figure.subplots(len(heights), len(bars), squeeze=False, height_ratios=heights)
    for column, (name, panel) in enumerate(bars.items()):
        _draw_speeds(axes[0][column], panel)
        axes[0][column].set_title(name, fontsize=9, loc="left")
        if curves:
            _draw_curves(axes[1][column], curves.get(name, {}))
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _shown(provider: str, providers: Iterable[str]) -> str:
    """What a chart calls a provider; where some ran as a CUDA graph, it says which did not."""
    name, *ways = provider.split("+")
    compilers = {"compile": ", torch.compile", "compile_no_layout": ", torch.compile without layouts"}
    shown = _NAMES.get(name, name) + "".join(compilers.get(way, "") for way in ways)
    graphs = any(other.endswith("+graph") for other in providers)
    return f"{shown} (no graph)" if graphs and "graph" not in ways else shown


def _draw_speeds(axis: Any, panel: dict[str, float]) -> None:
    """Draw images a second by provider, the fastest on top."""
    fastest = max(panel.values())
    for position, (provider, speed) in enumerate(sorted(panel.items(), key=lambda item: -item[1])):
        axis.barh(position, speed, height=0.8, color=network_colour(provider.split("+")[0]))
        text = f"{speed:,.4g}" if speed < 100 else f"{speed:,.0f}"
        axis.text(speed + 0.01 * fastest, position, text, va="center", fontsize=7)
    order = sorted(panel, key=lambda provider: -panel[provider])
    axis.set_yticks(range(len(panel)), [_shown(provider, panel) for provider in order], fontsize=8)
    axis.set_ylim(len(panel) - 0.4, -0.6)
    axis.set_xlim(0, 1.15 * fastest)
    axis.set_xlabel("images per second", fontsize=8)
    hide_frame(axis)


def _draw_curves(axis: Any, curves: Curves) -> None:
    """Draw milliseconds of a batch per time step over T: a horizontal line means a cost proportional to T."""
    if not curves:
        axis.set_visible(False)
        return
    for provider, points in curves.items():
        ordered = sorted(points.items())
        style = {"linestyle": "--" if "+graph" in provider else "-", "marker": "o", "markersize": 3}
        axis.plot(
            *zip(*ordered, strict=True),
            color=network_colour(provider.split("+")[0]),
            label=_shown(provider, curves),
            **style,
        )
    axis.set_xticks(sorted({steps for points in curves.values() for steps in points}))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("time steps T", fontsize=8)
    axis.set_ylabel("ms of the batch per time step", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    hide_frame(axis)


def network_colour(network: str) -> str:
    """Colour of a network: this package's green, lower bounds grey and blue, baselines warm."""
    colours = {"timm_gac": "#0b6e4f", "timm_gac_packed": "#4fa37f", "timm_gac_fused": "#17324d"}
    colours |= {"timm_gac_int8": "#6a4c93", "timm_gac_8bit": "#2b9d8f", "ann": "#5b7db1"}
    colours |= {"convolutions": "#9aa5b1", "published": "#7a5230"}
    colours |= {"spikingjelly": "#e0a458", "spikingjelly_memopt": "#c98a2b"}
    return colours.get(network, "#b04a5a")
