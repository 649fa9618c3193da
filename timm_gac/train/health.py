"""Firing rates by layer and epoch, with warnings about silent and saturated layers.

A layer that hardly fires passes nothing on and gets hardly any gradient, as few membranes come near the threshold. A
layer that always fires is a constant.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..analysis.evaluate import Evaluation
from ..analysis.gate import firing_level
from ..layers.encoder import DirectCoding, GatedAttentionCoding
from ..layers.learned import learned_values
from ..runtime.figures import new_figure
from .runlog import read_history, write_history

SILENT_BELOW = 0.001  # spikes per neuron and step; healthy layers of these networks lie between 0.02 and 0.4
SATURATED_ABOVE = 0.9
FALL = 10.0  # times less than at the evaluation before
SHOWN = 3  # layers named in a warning


def rate_warnings(rates: dict[str, float], before: dict[str, float]) -> list[str]:
    """Warn of layers that are silent, saturated, or fire `FALL` times less than before: a line for each kind.

    Args:
        rates: Spikes per neuron and time step, by layer.
        before: The rates at the evaluation before; layers may be missing.
    """
    silent = {name: f"{rate:.2%}" for name, rate in rates.items() if rate < SILENT_BELOW}
    busy = {name: f"{rate:.1%}" for name, rate in rates.items() if rate > SATURATED_ABOVE}
    falling = {
        name: f"{rate:.2%} after {before[name]:.2%}"
        for name, rate in rates.items()
        if name not in silent and rate * FALL < before.get(name, 0.0)
    }
    kinds = (
        (
            silent,
            "hardly fire",
            f"under {SILENT_BELOW:.1%}",
            "lower the learning rate or the weight decay, or look at the batch norm",
        ),
        (
            busy,
            "nearly always fire",
            f"over {SATURATED_ABOVE:.0%}",
            "nearly constant: lower the learning rate, or look at the batch norm",
        ),
        (falling, "fire much less", "at the evaluation before", "may be about to fall silent"),
    )
    return [f"warning: {_listed(layers, verb)} ({bound}): {advice}" for layers, verb, bound, advice in kinds if layers]


def _listed(layers: dict[str, str], verb: str) -> str:
    """``a fires at 1 %``, or the first few of several with what they do."""
    if len(layers) == 1:
        return " fires at ".join(*layers.items())
    shown = ", ".join(f"{name} at {rate}" for name, rate in [*layers.items()][:SHOWN])
    return f"{len(layers)} layers {verb}: {shown}" + (", ..." if len(layers) > SHOWN else "")


def silent_by_design(network: nn.Module) -> set[str]:
    """``lif`` where a gate of 0.5 everywhere is too low for it ever to fire, as in the CIFAR dialect; else no layer."""
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, GatedAttentionCoding) or encoder.gate != "half" or encoder.spec.neuron != "lif":
        return set()
    learns = learned_values(getattr(network, "lif", None))  # and may learn to fire
    return set() if learns or firing_level(encoder.spec, encoder.num_steps) <= 0.5 else {"lif"}


def watch_rates(out: Path, epoch: int, evaluation: Evaluation, network: nn.Module) -> list[str]:
    """Add an epoch to ``firing_rates.csv``, draw ``firing_rates.png``, and warn of layers.

    Args:
        out: Folder of the run. Rows of this epoch and later ones are replaced, for a resumed run.
        epoch: Number of the epoch, from 1.
        evaluation: Evaluation with firing rates; without any, nothing is done.
        network: The network; the output of a direct encoder is left out, as it is no spikes.

    Returns:
        Warnings, at most one of each kind; see `rate_warnings`. None of what is `silent_by_design`.
    """
    coded = {name for name, module in network.named_modules() if isinstance(module, DirectCoding)}
    rates = {name: rate for name, rate in evaluation.firing_rates.items() if name not in coded}
    if not rates:
        return []
    file = out / "firing_rates.csv"
    history = read_history(file, list(rates), epoch)
    before = dict(zip(rates, history[-1][1], strict=True)) if history else {}
    history.append((epoch, list(rates.values())))
    write_history(file, list(rates), history, ".6f")
    _draw(out / "firing_rates.png", list(rates), history)
    meant = silent_by_design(network)
    return rate_warnings({name: rate for name, rate in rates.items() if name not in meant}, before)


def _draw(file: Path, names: list[str], history: list[tuple[int, list[float]]]) -> None:
    """Draw layers top to bottom, epochs left to right, rates on a logarithmic scale from `SILENT_BELOW`."""
    from matplotlib.colors import LogNorm

    figure = new_figure(7.2, 1.4 + 0.2 * len(names), dpi=110)
    axis = figure.subplots()
    epochs = [epoch for epoch, _ in history]
    values = [[max(rates[layer], SILENT_BELOW) for _, rates in history] for layer in range(len(names))]
    image = axis.imshow(values, cmap="viridis", norm=LogNorm(SILENT_BELOW, 1.0), aspect="auto", interpolation="nearest")
    shown = range(0, len(epochs), -(-len(epochs) // 10))
    axis.set_xticks(list(shown), [str(epochs[index]) for index in shown])
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("epoch")
    axis.set_title("Firing rate by layer (darkest: silent)", loc="left", fontsize=11)
    figure.colorbar(image, ax=axis, fraction=0.04, label="share of neuron-steps that fire")
    figure.savefig(file)
