r"""What the gates of several runs did by epoch, one picture: ``python tools/draw_gates.py OUT.png LABEL=PREFIX ...``.

PREFIX names two tables of a run: PREFIX.csv, its metrics.csv, and PREFIX.gate.csv, its gate.csv, which a run without a
learned gate does not have. results/gate_by_epoch.png is of four runs of results/epochs:

    E=results/epochs/cifar100_fast.int8_convs.40_epochs.gate_
    python tools/draw_gates.py results/gate_by_epoch.png "default, seed 1"=${E}full.seed1 "--gate-lr 0.1"=${E}slow \
        "--gate-decay 1"=${E}decay "direct coding"=${E}direct
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from timm_gac.runtime.figures import hide_frame, new_figure

PANELS = {
    "largest_temporal": "Largest temporal score",
    "spatial_std": "Deviation of the spatial scores",
    "test_top1": "Top-1 (%)",
}


def columns(file: Path) -> dict[str, list[float]]:
    """The columns of a table of numbers by name; an empty cell is left out with its row's epoch, as ``NAME epochs``.

    Raises:
        ValueError: The file has no row.
    """
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows:
        raise ValueError(f"expected rows in {file}, got none: name another run")
    found = dict[str, list[float]]()
    for name in rows[0]:
        filled = [row for row in rows if row[name]]
        found[name] = [float(row[name]) for row in filled]
        found[f"{name} epochs"] = [float(row["epoch"]) for row in filled]
    return found


def draw(runs: dict[str, Path], out: Path) -> None:
    """Draw both scores and top-1 of runs by epoch.

    Args:
        runs: Prefix of a run's tables, by the label of its line.
        out: PNG to write.
    """
    figure = new_figure(10, 3.3)
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS)), strict=True))
    for nth, (label, prefix) in enumerate(runs.items()):
        metrics, gate = prefix.with_name(prefix.name + ".csv"), prefix.with_name(prefix.name + ".gate.csv")
        values = columns(metrics) | (columns(gate) if gate.exists() else {})
        for name, axis in panels.items():
            if any(values.get(name, [])):  # else there is no such score, and 0 has no place on a logarithmic axis
                scale = 100 if name == "test_top1" else 1
                drawn = [scale * value for value in values[name]]
                axis.plot(values[f"{name} epochs"], drawn, color=f"C{nth}", label=label, linewidth=1.5)
    for name, axis in panels.items():
        axis.set(xlabel="epoch", yscale="linear" if name == "test_top1" else "log")
        axis.set_title(PANELS[name], loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    panels["test_top1"].legend(fontsize=8, loc="lower right")
    hide_frame(*panels.values())
    figure.savefig(out)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="draw_gates.py"
    )
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("runs", nargs="+", metavar="LABEL=PREFIX")
    given = parser.parse_args()
    runs = dict[str, Path]()
    for run in given.runs:
        label, equals, prefix = run.partition("=")
        if not (label and equals and Path(prefix + ".csv").is_file()):
            parser.error(f"expected LABEL=PREFIX with a table PREFIX.csv, got {run!r}: see results/epochs")
        runs[label] = Path(prefix)
    draw(runs, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
