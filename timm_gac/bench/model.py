"""Model benchmark: a network of this package, baselines with the same weights, and lower bounds of time.

Run it as ``timm-gac bench model``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gac_kernels import resolve_backend

from ..runtime.device import resolve_device
from ..runtime.files import check_csv
from ..runtime.provenance import PROVENANCE, provenance
from . import steps as bench_steps
from .charts import Curves, Groups, throughput_chart
from .harness import Row, append_rows, exit_on_sigterm, first_error, rows_table, show_table, time_limit
from .networks import Unavailable
from .options import ModelBenchConfig
from .profile import append_json, read_json
from .session import Session

_logger = logging.getLogger(__name__)
COLUMNS = (
    *("model", "provider", "mode", "precision", "num_steps", "batch", "image_size", "memory_format", "threads"),
    *("status", "images_per_s", "median_ms", "p20_ms", "p80_ms", "repetitions", "steps_per_block", "peak_gib"),
    *("roofline_fraction", "setup_s", "note", *PROVENANCE),
)
CPU_BATCH = 16  # images of an inference step that a CPU times in seconds
TABLE = {"provider": "", "mode": "", "precision": "", "num_steps": "d", "batch": "d", "images_per_s": ".0f"}
TABLE |= {"median_ms": ".2f", "p20_ms": ".2f", "p80_ms": ".2f", "peak_gib": ".2f", "roofline_fraction": ".3f"}
TABLE |= {"setup_s": ".0f", "status": "", "note": ""}


def bench_model(config: ModelBenchConfig) -> tuple[list[Row], list[Row]]:
    """Check and time every provider; write the CSV, the PNG and the profiles that the config names.

    Returns:
        One row per case and provider, with `COLUMNS` as keys, and one profile per case where asked for. A row's
        ``status`` is ``ok``, ``skipped`` (the note says why), ``failed check``, ``out of time`` or ``error``; only the
        first has times.

    Raises:
        ValueError: A file to append to is of another kind; nothing has been measured then.
    """
    if config.csv:
        check_csv(config.csv, COLUMNS)
    if profile := config.profile_path():
        read_json(profile)
    results = _Results(config, resolve_device(config.device))
    if results.device.type == "cpu" and ("train" in config.modes or config.infer_batch > CPU_BATCH):
        limit = f", and is given up after {config.provider_limit_s:g} s" if config.provider_limit_s else ""
        quick = f"--modes infer --infer-batch {CPU_BATCH}"
        _logger.warning("on a CPU a provider may take minutes%s; quick is: %s", limit, quick)
    with exit_on_sigterm():
        try:
            _measure(config, results)
        finally:  # results so far are kept if the run is stopped
            rows = results.write()
            if profile:
                append_json(profile, results.profiles)
    if config.png:
        write_chart(rows, config.png)
    return rows, results.profiles


class _Results:
    """Rows and profiles of a run so far."""

    def __init__(self, config: ModelBenchConfig, device: torch.device) -> None:
        self.device = device
        self.origin = provenance(device, resolve_backend(device), config.commit)
        self.rows: list[Row] = []
        self.profiles: list[Row] = []
        self._table = _GrowingTable(config.csv) if config.csv else None

    def write(self) -> list[Row]:
        """Return the rows with their fraction of the roofline and the provenance; write them to the CSV."""
        finished = [_finish(row, self.rows) | self.origin for row in self.rows]
        if self._table:
            self._table.write(finished)
        return finished


def _measure(config: ModelBenchConfig, results: _Results) -> None:
    """Check and time every provider of every case within the time budget; add the rows and profiles to ``results``."""
    deadline = time.perf_counter() + (config.time_budget_s or math.inf)
    for case in config.cases():
        bench_steps.free_memory(results.device)
        session = Session(case, results.device, config.steps)
        for provider in config.providers_of(case):
            remaining = deadline - time.perf_counter()
            if remaining <= 0:
                _logger.warning("time budget spent: no %s %s", provider, case)
                continue
            limit = min(remaining, config.provider_limit_s or math.inf)
            results.rows.append(_bench_provider(session, provider, limit))
            results.write()  # now: a compilation that never ends would lose the rows
        if config.profile and deadline > time.perf_counter():
            results.profiles.append(asdict(case) | session.profile() | results.origin)
        del session


class _GrowingTable:
    """A run's rows at the end of a CSV file. All are rewritten with each new row, which may complete earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path, self.first, self.rows = path, 0, 0
        self.begin = self.end = self._size()

    def write(self, rows: Sequence[Row]) -> None:
        """Write all rows so far; if another process has appended rows meanwhile, only the new ones, after those."""
        if self._size() != self.end:
            self.begin, self.first = self._size(), self.rows
        append_rows(self.path, COLUMNS, rows[self.first :], self.begin)
        self.rows, self.end = len(rows), self._size()

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _bench_provider(session: Session, provider: str, limit_s: float) -> Row:
    """The row of one provider, also if it fails."""
    threads = torch.get_num_threads() if session.device.type == "cpu" else None
    row: Row = dict.fromkeys(COLUMNS) | asdict(session.case) | {"provider": provider, "threads": threads}
    bench_steps.free_memory(session.device)
    started = time.perf_counter()
    try:
        with time_limit(limit_s):
            row |= session.measure(provider)
    except Unavailable as reason:
        row |= {"status": "skipped", "note": str(reason)}
    except TimeoutError as error:
        row |= {"status": "out of time", "note": str(error)}
    except Exception as error:  # a baseline that cannot run becomes a row; the run goes on
        _logger.debug("%s", provider, exc_info=True)
        row |= {"status": "error", "note": first_error(error)}
    speed = f"{row['images_per_s']:.1f} img/s" if row["status"] == "ok" else f"{row['status']}: {row['note']}"
    labels = (session.case.mode, session.case.precision, session.case.num_steps, provider)
    _logger.info("%4.0f s  %s %s T=%d %s: %s", time.perf_counter() - started, *labels, speed)
    return row


def _finish(row: Row, rows: list[Row]) -> Row:
    """Add the fraction of the roofline: the fastest network of convolutions alone of the same case."""
    keys = ("model", "mode", "precision", "num_steps", "batch", "image_size")
    peers = [other for other in rows if all(other[key] == row[key] for key in keys) and other["status"] == "ok"]
    bounds = [other["images_per_s"] for other in peers if other["provider"].startswith("convolutions")]
    return row | {"roofline_fraction": row["images_per_s"] / max(bounds)} if bounds and row["status"] == "ok" else row


def model_table(rows: Sequence[Row]) -> Any:
    """The rows as a rich table."""
    first = rows[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    title = f"{first['model']}, {first['image_size']}x{first['image_size']}, {first['device']}{threads}, "
    return rows_table(rows, TABLE, title + f"torch {first['torch']}, triton {first['triton']}, {first['backend']}")


def profile_tables(profiles: Sequence[Row]) -> list[Any]:
    """Each profile as a rich table."""
    tables = []
    for found in profiles:
        title = f"timm_gac, {found['mode']}, {found['precision']}, T={found['num_steps']}, batch {found['batch']}: "
        kinds = [{"kind": name, **kind} for name, kind in found["kinds"].items()]
        columns = {"kind": "", "ms": ".2f", "share": ".1%", "calls": ".0f"}
        tables.append(rows_table(kinds, columns, title + f"{found['total_ms']:.2f} ms of kernels or operators a step"))
    return tables


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """Draw throughput by provider at the first T and, with several T, the cost of one time step; a column per mode."""
    timed = [row for row in rows if row["status"] == "ok"]
    bars: Groups = {}
    curves: dict[str, Curves] = {}
    for row in timed:
        panel = f"{row['mode']}, {row['precision']}, batch {row['batch']}"
        curves.setdefault(panel, {}).setdefault(row["provider"], {})[row["num_steps"]] = (
            row["median_ms"] / row["num_steps"]
        )
        if row["num_steps"] == rows[0]["num_steps"]:
            bars.setdefault(panel, {})[row["provider"]] = row["images_per_s"]
    several = len({row["num_steps"] for row in timed}) > 1
    if bars:
        first = rows[0]
        title = f"{first['model']}, T={first['num_steps']}, {first['device']}, {first['date_utc']} UTC"
        curves = {name: {key: line for key, line in panel.items() if len(line) > 1} for name, panel in curves.items()}
        throughput_chart(path, bars, curves if several else {}, title=title)


def show_results(rows: Sequence[Row], profiles: Sequence[Row]) -> int:
    """Print the tables; 1 when a network of this package failed its check or could not run, else 0."""
    if rows:
        show_table(model_table(rows))
    for table in profile_tables(profiles):
        show_table(table)
    return exit_code(rows)


def exit_code(rows: Sequence[Row]) -> int:
    """1 when a network of this package failed its check or could not run, else 0."""
    own = (row for row in rows if row["provider"].startswith("timm_gac"))
    return int(any(row["status"] in ("failed check", "error") for row in own))
