"""Benchmark of training loops: runs the entries, writes each row as it comes, draws them.

Run it as ``timm-gac bench loops``.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gac_kernels import resolve_backend

from ...runtime.device import resolve_device
from ...runtime.dtypes import AUTOCAST
from ...runtime.figures import hide_frame, new_figure
from ...runtime.files import check_csv
from ...runtime.provenance import PROVENANCE, provenance
from ..charts import network_colour
from ..harness import Row, append_rows, exit_on_sigterm, first_error, rows_table, show_table, time_limit
from ..networks import Unavailable
from ..session import Session
from .entries import measure_entry, split_entry, versions_of
from .loaders import measure_loader
from .options import ANCHOR, LoopBenchConfig
from .timm_script import measure_script

_logger = logging.getLogger(__name__)
SETTINGS = ("model", "precision", "num_steps", "batch", "image_size")
COLUMNS = (
    *("entry", "loop", "network", "way", *SETTINGS, "optimizer", "status", "images_per_s", "of_graphed_step"),
    *("median_ms", "p20_ms", "p80_ms", "repetitions", "steps_per_block", "peak_gib", "reserved_gib", "setup_s"),
    *("compile_s", "epochs_s", "graphs", "graph_breaks", "recompiles", "late_recompiles"),
    *("host_cores", "versions", "note", *PROVENANCE),
)
TABLE = {"entry": "", "images_per_s": ".0f", "of_graphed_step": ".2f", "median_ms": ".2f", "p80_ms": ".2f"}
TABLE |= {
    "peak_gib": ".2f",
    "reserved_gib": ".2f",
    "compile_s": ".0f",
    "epochs_s": ".0f",
    "graphs": "d",
    "graph_breaks": "d",
}
TABLE |= {"recompiles": "d", "late_recompiles": "d", "setup_s": ".0f", "status": "", "note": ""}


def bench_loops(config: LoopBenchConfig) -> list[Row]:
    """Measure every entry, append its row to the CSV as soon as it is there, and draw the PNG.

    Returns:
        One row per entry of this call, with `COLUMNS` as keys. ``status`` is ``ok``, ``skipped`` (the note says why),
        ``failed check``, ``out of time`` or ``error``. ``of_graphed_step`` is the speed as a share of `ANCHOR`'s in the
        same call; rows of one call have one ``date_utc``.

    Raises:
        ValueError: The CSV has other columns; nothing has been measured then.
    """
    if config.csv:
        check_csv(config.csv, COLUMNS)
    device, case = resolve_device(config.device), config.case()
    backend = resolve_backend(device, AUTOCAST[config.precision] or torch.float32)
    origin: Row = dict(provenance(device, backend, config.commit))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fixed = {name: getattr(case, name) for name in SETTINGS} | {"host_cores": cores} | origin
    measured = set() if config.again or not config.csv else _measured(config.csv, fixed)
    deadline, rows, speeds = time.perf_counter() + (config.time_budget_s or math.inf), list[Row](), dict[str, float]()
    with exit_on_sigterm():
        session = Session(case, device, steps=1)
        for entry in config.entries():
            if entry in measured and entry != ANCHOR:
                _logger.info("%s is in %s already: --again measures it anew", entry, config.csv)
                continue
            limit = min(deadline - time.perf_counter(), config.entry_limit_s or math.inf)
            if limit <= 0:
                _logger.warning("time budget spent: no %s", entry)
                continue
            row = dict.fromkeys(COLUMNS) | fixed | _measure(config, session, entry, limit)
            if row["images_per_s"]:
                speeds[entry] = row["images_per_s"]
                row["of_graphed_step"] = speeds[entry] / speeds[ANCHOR] if ANCHOR in speeds else None
            rows.append(row)
            if config.csv:
                append_rows(config.csv, COLUMNS, [row])
    if config.png:
        draw(rows, config.png)
    return rows


def _measure(config: LoopBenchConfig, session: Session, entry: str, limit_s: float) -> Row:
    """What is measured of one entry, also if it fails."""
    loop, network, way = split_entry(entry)
    row: Row = {"entry": entry, "loop": loop, "network": network, "way": way, "versions": versions_of(entry)}
    case, device, began = session.case, session.device, time.perf_counter()
    try:
        with time_limit(limit_s):
            if loop == "loader":
                row |= measure_loader(network, case, device, config.seconds)
            elif loop == "timm":
                row |= measure_script(case, device, entry, config.timm_train, config.seconds, limit_s)
            else:
                measure_entry(session, entry, config.seconds, config.epochs, row)
    except Unavailable as reason:
        row |= {"status": "skipped", "note": str(reason)}
    except TimeoutError as error:
        row |= {"status": "out of time", "note": str(error)}
    except Exception as error:  # a loop that cannot run becomes a row; the run goes on
        _logger.debug("%s", entry, exc_info=True)
        # Compilers turn the end of the time into an error of their own.
        late = time.perf_counter() - began >= limit_s
        row |= {"status": "out of time" if late else "error", "note": first_error(error)}
    speed = f"{row['images_per_s']:.1f} img/s" if row["status"] == "ok" else f"{row['status']}: {row['note']}"
    _logger.info("%4.0f s  %s: %s", time.perf_counter() - began, entry, speed)
    return row


def _measured(path: Path, fixed: Row) -> set[str]:
    """Entries that a table has with the same settings from the same commit, device and versions."""
    if not path.exists():
        return set()
    names = (*SETTINGS, "device", "torch", "triton", "commit")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    same = [row for row in rows if all(row[name] == str(fixed[name]) for name in names)]
    return {row["entry"] for row in same if row["status"] == "ok"}


def loops_table(rows: Sequence[Row]) -> Any:
    """The rows as a rich table."""
    first = rows[0]
    title = f"{first['model']}, {first['image_size']}x{first['image_size']}, batch {first['batch']}, "
    title += f"T={first['num_steps']}, {first['precision']}, {first['device']}, {first['host_cores']} cores, "
    return rows_table(rows, TABLE, title + f"torch {first['torch']}, triton {first['triton']}, {first['backend']}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: images a second of each entry that trained, loop below loop."""
    bars = [row for row in rows if row["status"] == "ok" and row["loop"] != "loader"]
    if not bars:
        return
    figure = new_figure(8, 1.2 + 0.25 * len(bars))
    axis, fastest = figure.subplots(), max(row["images_per_s"] for row in bars)
    order = {loop: place for place, loop in enumerate(dict.fromkeys(row["loop"] for row in bars))}
    bars.sort(key=lambda row: (order[row["loop"]], -row["images_per_s"]))
    places = [place + 0.6 * order[row["loop"]] for place, row in enumerate(bars)]
    for place, row in zip(places, bars, strict=True):
        axis.barh(place, row["images_per_s"], height=0.8, color=network_colour(row["network"]))
        memory = f", {row['peak_gib']:.2f} GiB" if row["peak_gib"] else ""
        text = f"{row['images_per_s']:,.4g}" if row["images_per_s"] < 100 else f"{row['images_per_s']:,.0f}"
        axis.text(row["images_per_s"] + 0.01 * fastest, place, text + memory, va="center", fontsize=7)
    axis.set_yticks(places, [row["entry"] for row in bars], fontsize=8)
    axis.set_ylim(places[-1] + 0.7, -0.7)
    axis.set_xlim(0, 1.25 * fastest)
    axis.set_xlabel("images per second in training", fontsize=8)
    first = bars[0]
    axis.set_title(f"{first['model']}, T={first['num_steps']}, batch {first['batch']}, {first['device']}", fontsize=9)
    hide_frame(axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show_results(rows: Sequence[Row]) -> int:
    """Print the table; 1 when a network of this package failed its check or could not run, else 0."""
    if rows:
        show_table(loops_table(rows))
    own = (row for row in rows if row["network"].startswith("timm_gac"))
    return int(any(row["status"] in ("failed check", "error") for row in own))
