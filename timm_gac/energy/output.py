"""An energy report as a table, JSON, CSV and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime import files
from ..runtime.figures import hide_frame, new_figure
from ..runtime.terminal import new_table
from .report import EnergyReport
from .tables import CONVENTIONS

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("layer", "kind", "macs", "runs", "input", "rate", "sops", *(f"{name}_mj" for name in CONVENTIONS))


def layer_rows(report: EnergyReport) -> list[dict[str, Any]]:
    """One row per layer: counts, and energy under each convention, per image."""
    energies = {name: report.layer_mj(name) for name in CONVENTIONS}
    return [
        {"layer": layer.name, "input": "binary" if layer.binary else "real"}
        | {name: getattr(layer, name) for name in ("kind", "macs", "runs", "rate", "sops")}
        | {f"{name}_mj": values[layer.name] for name, values in energies.items()}
        for layer in report.layers
    ]


def report_dict(report: EnergyReport) -> dict[str, Any]:
    """The report, ready for JSON."""
    totals = report.totals()
    return {
        **{name: getattr(report, name) for name in ("model", "weights", "trained", "num_steps", "images")},
        "unit": "per image; energy in mJ",
        **{
            figure: {name: row[figure] for name, row in totals.items()}
            for figure in ("energy_mj", "of_ann", "macs", "acs")
        },
        "neurobench_dense": report.dense,
        "costs": {name: getattr(report.costs, name) for name in ("name", "mac_pj", "ac_pj", "source")},
        "energy_by_step_mj": {name: list(report.energy_by_step(name)) for name in CONVENTIONS},
        "layers": layer_rows(report),
        "not_run": list(report.not_run),
    }


def write_json(report: EnergyReport, file: Path) -> None:
    """Write the whole report."""
    files.write_json(file, report_dict(report))


def write_csv(report: EnergyReport, file: Path) -> None:
    """Write one row per layer."""
    files.write_csv(file, COLUMNS, layer_rows(report))


def layer_table(report: EnergyReport) -> Table:
    """One row per layer, for a terminal."""
    title = f"{report.model}, T={report.num_steps}, weights {report.weights or 'as given'}, images: {report.images}"
    # What a name tells, the kind of a layer, is left out: the rest fits 80 columns.
    table = new_table(title, ("layer", "input"), padding=0)
    names = [name.replace("neurobench", "neuro-\nbench") for name in CONVENTIONS]
    for heading in ("MACs\n/run", "runs", "rate", "SOPs", *(f"{name}\nµJ" for name in names)):
        table.add_column(heading, justify="right", overflow="fold")
    for row in layer_rows(report):
        energies = [f"{1000 * row[f'{name}_mj']:,.2f}" for name in CONVENTIONS]
        table.add_row(
            row["layer"],
            row["input"],
            _short(row["macs"]),
            f"{row['runs']:g}",
            f"{row['rate']:.1%}",
            _short(row["sops"]),
            *energies,
        )
    return table


def totals_table(report: EnergyReport) -> Table:
    """One row per convention, and the ANN's, for a terminal."""
    table = new_table(f"per image, {report.costs.name}", ["convention"], ("MACs", "ACs", "mJ", "of the ANN"))
    for name, row in report.totals().items():
        numbers = f"{row['macs']:,.0f}", f"{row['acs']:,.0f}", f"{row['energy_mj']:.4g}", f"{row['of_ann']:.1%}"
        table.add_row(name, *numbers)
    return table


def write_chart(report: EnergyReport, file: Path) -> None:
    """Draw the energy of each convention by kind of layer, and the firing rate of each layer's input."""
    colours = {"stem": "#17324d", "attention": "#e0a458", "shortcut": "#b04a5a", "conv": "#0b6e4f", "head": "#9aa5b1"}
    figure = new_figure(12, max(4.2, 1.6 + 0.2 * len(report.layers)), dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    names = [*CONVENTIONS, "ann"]
    energies = {name: report.layer_mj(name) for name in CONVENTIONS}
    energies["ann"] = {
        layer.name: 0.0 if layer.kind == "attention" else layer.macs * report.costs.mac_pj * 1e-9
        for layer in report.layers
    }
    bottom = dict.fromkeys(names, 0.0)
    for kind, colour in colours.items():
        parts = [sum(energies[n][layer.name] for layer in report.layers if layer.kind == kind) for n in names]
        left.bar(names, parts, bottom=list(bottom.values()), color=colour, label=kind, width=0.65)
        bottom = {name: bottom[name] + part for name, part in zip(names, parts, strict=True)}
    for place, total in enumerate(bottom.values()):
        left.text(place, total, f"{total:.3g} mJ", ha="center", va="bottom", fontsize=9)
    left.margins(y=0.1)
    left.set_ylabel("mJ per image")
    left.set_title("Energy by convention", loc="left")
    left.legend(frameon=False, fontsize=8)
    rows = [layer for layer in report.layers if not layer.name.startswith("encoder.temporal")]
    for place, layer in enumerate(rows):
        style = {} if layer.binary else {"alpha": 0.35, "hatch": "///"}
        right.barh(place, layer.rate, color=colours[layer.kind], **style)
        right.text(layer.rate, place, f" {layer.rate:.0%}", va="center", fontsize=7)
    right.set_yticks(range(len(rows)), [layer.name for layer in rows], fontsize=7)
    right.invert_yaxis()
    right.set_xlim(0, 1.12)
    right.set_xlabel("share of the input that is not 0")
    right.set_title("Input of each layer: solid = spikes, hatched = real values", loc="left")
    hide_frame(left, right)
    figure.suptitle(
        f"{report.model}, T={report.num_steps}, {report.images} images, weights {report.weights or 'as given'}, "
        f"{report.costs.name}",
        fontsize=10,
    )
    figure.savefig(file)


def _short(count: float) -> str:
    """A count for a narrow column: 9.63M; `layer_rows` has all digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
