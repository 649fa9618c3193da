"""Kernel benchmark: each op that passes its check, compared with baselines and with copy bandwidth.

Run it as ``timm-gac bench kernels``.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gac_kernels import resolve_backend

from ..runtime.device import resolve_device
from ..runtime.dtypes import DTYPES
from ..runtime.files import check_csv
from ..runtime.provenance import PROVENANCE, provenance
from . import ops as bench_ops
from .charts import Groups, bar_chart
from .harness import (
    Row,
    append_rows,
    measure_copy,
    measure_peak_bytes,
    measure_saved_bytes,
    measure_time,
    rows_table,
    show_table,
)
from .ops import SPECS, BenchOp, Case
from .options import KernelBenchConfig

_logger = logging.getLogger(__name__)
COLUMNS = (
    *("op", "provider", "spec", "dtype", "memory_format", "num_steps", "shape", "direction", "status"),
    *("median_ms", "p20_ms", "p80_ms", "repetitions", "bytes", "gb_per_s", "copy_fraction"),
    *("peak_bytes", "saved_bytes_per_step", "note", *PROVENANCE),
)
TABLE = {"op": "", "provider": "", "spec": "", "dtype": "", "memory_format": "", "num_steps": "d", "direction": ""}
TABLE |= {"median_ms": ".3f", "p20_ms": ".3f", "p80_ms": ".3f", "gb_per_s": ".0f", "copy_fraction": ".3f"}
TABLE |= {"peak_gib": ".2f", "saved_bytes_per_step": ".2f", "status": "", "note": ""}


def bench_kernels(config: KernelBenchConfig) -> list[Row]:
    """Check and time every case; write the CSV and PNG that the config names.

    Returns:
        One row per case and direction, with `COLUMNS` as keys. A case that fails its check has one row without times,
        whose ``status`` is ``failed check``. Rows with ``op='copy'`` have the copy bandwidth at the start and the end.

    Raises:
        ValueError: The CSV file has another header; nothing was measured.
    """
    device = resolve_device(config.device)
    if config.quick:
        size = min(config.size, 2**24 if device.type == "cuda" else 2**20)
        config = replace(config, size=size, num_steps=(4,), baseline_num_steps=4, target_ms=20.0)
    if config.csv:
        check_csv(config.csv, COLUMNS)
    origin = provenance(device, resolve_backend(device), config.commit)
    started = time.perf_counter()
    rows = _copy_rows(config, device, "start")
    for provider, case in config.cases():
        elapsed = time.perf_counter() - started
        if config.time_budget_s and elapsed > config.time_budget_s:
            _logger.warning("time budget of %g s spent: stopping before %s %s", config.time_budget_s, provider, case)
            break
        new = _bench_case(config, provider, case, device)
        times = "".join(f", {row['direction']} {row['median_ms']:.3f} ms" for row in new if row["median_ms"])
        label = " ".join(map(str, asdict(case).values()))
        status = new[-1]["status"] if new else "not installed"
        _logger.info("%4.0f s  %s %s: %s%s", elapsed, provider, label, status, times)
        rows += new
    rows += _copy_rows(config, device, "end")
    rows = [_finish(row, rows) | origin for row in rows]
    if config.csv:
        append_rows(config.csv, COLUMNS, rows)
    if config.png:
        write_chart(rows, config.png)
    return rows


def _copy_rows(config: KernelBenchConfig, device: torch.device, moment: str) -> list[Row]:
    rows = []
    for name in config.dtypes:
        timing = measure_copy(config.size, DTYPES[name], device, target_ms=config.target_ms)
        row: Row = {"op": "copy", "provider": "torch", "dtype": name, "shape": str(config.size), "direction": moment}
        row |= {"status": "ok", "bytes": 2 * config.size * DTYPES[name].itemsize, **asdict(timing)}
        rows.append(dict.fromkeys(COLUMNS) | row)
    return rows


def _bench_case(config: KernelBenchConfig, provider: str, case: Case, device: torch.device) -> list[Row]:
    """Rows of one provider on one case: forward and forward+backward, or one row with the reason why not."""
    op, frame = bench_ops.OPS[case.op], config.frame
    batch = max(1, config.size // (case.num_steps * math.prod(frame)))
    inputs = bench_ops.make_inputs(op=op, case=case, batch=batch, frame=frame, device=device)
    common = dict.fromkeys(COLUMNS) | asdict(case) | {"provider": provider, "note": ""}
    common["shape"] = "x".join(map(str, (case.num_steps, batch, *frame)))
    try:
        if provider == "timm_gac":
            run = op.run
            failure = bench_ops.check_case(op, case, inputs)
            if failure:
                return [common | {"direction": "check", "status": "failed check", "note": failure}]

            def function(*tensors: torch.Tensor) -> torch.Tensor:
                return run(*tensors, SPECS[case.spec])
        else:
            baseline = bench_ops.make_baseline(provider, case.op, SPECS[case.spec], inputs)
            if baseline is None:
                return []
            function = baseline
            common["note"] = _flip_note(op, case, inputs, function)
        return [common | row for row in _time_case(case, inputs, function, config.target_ms)]
    except Exception as error:  # a baseline or op that cannot run becomes a row; the run goes on
        _logger.exception("%s %s", provider, case)
        status = "failed check" if provider == "timm_gac" else "error"
        note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return [common | {"direction": "check", "status": status, "note": note}]
    finally:
        del inputs
        gc.collect()


def _flip_note(op: BenchOp, case: Case, inputs: Sequence[torch.Tensor], baseline: Callable[..., torch.Tensor]) -> str:
    """Say how many spikes of a baseline differ from the reference: SpikingJelly also fires at the threshold."""
    with torch.no_grad():
        expected = op.reference(*(tensor.float() for tensor in inputs), SPECS[case.spec]) != 0
        flips = ((baseline(*inputs) != 0) != expected).float().mean().item()
    return f"{flips:.1e} of spikes differ"


def _time_case(
    case: Case, inputs: Sequence[torch.Tensor], function: Callable[..., torch.Tensor], target_ms: float
) -> list[Row]:
    """What is measured of a case, forward and forward+backward."""
    device = inputs[0].device
    output = function(*inputs).detach()
    grad = torch.randn_like(output)
    mask = bench_ops.mask_bytes(bench_ops.OPS[case.op], SPECS[case.spec], case.num_steps, output[0].numel())
    counts = bench_ops.count_bytes(inputs, output, mask)
    saved = {"saved_bytes_per_step": measure_saved_bytes(lambda: function(*inputs)) / output.numel()}
    del output

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*inputs)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(*inputs), list(inputs), grad)

    directions: tuple[tuple[str, Callable[[], object], Row], ...]
    directions = (("forward", forward, {}), ("forward+backward", forward_backward, saved))
    rows = []
    for (direction, timed, extra), count in zip(directions, counts, strict=True):
        timing = asdict(measure_time(timed, device, target_ms=target_ms))
        measured = {"direction": direction, "status": "ok", "bytes": count, **timing, **extra}
        rows.append(measured | {"peak_bytes": measure_peak_bytes(timed, device)})
    return rows


def _finish(row: Row, rows: list[Row]) -> Row:
    """Add bandwidth and its fraction of the copy bandwidth, known only at the end of the run."""
    if row["median_ms"] is None:
        return row
    copies = [copy for copy in rows if copy["op"] == "copy" and copy["dtype"] == row["dtype"]]
    bandwidth = statistics.median(copy["bytes"] / copy["median_ms"] for copy in copies)
    speed = row["bytes"] / row["median_ms"]  # bytes per millisecond
    return row | {"gb_per_s": speed / 1e6, "copy_fraction": speed / bandwidth}


def kernel_table(rows: Sequence[Row]) -> Any:
    """The rows as a rich table."""
    shown = [row | {"peak_gib": None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30} for row in rows]
    first = rows[0]
    title = f"{first['device']}, torch {first['torch']}, triton {first['triton']}, backend {first['backend']}"
    return rows_table(shown, TABLE, title)


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """Draw the fraction of copy bandwidth: a panel per op and direction, a group per dtype and T, a bar per provider.

    Of both specs only CIFAR's is drawn, of both memory formats only contiguous.
    """
    timed = [row for row in rows if row["op"] != "copy" and row["status"] == "ok"]
    spec = "cifar" if any(row["spec"] == "cifar" for row in timed) else "imagenet"
    panels: dict[str, Groups] = {}
    for row in sorted(timed, key=lambda row: row["memory_format"] == "channels_last"):
        if row["spec"] == spec:
            groups = panels.setdefault(f"{row['op']}, {row['direction']}", {})
            bars = groups.setdefault(f"{row['dtype']}, T={row['num_steps']}", {})
            bars.setdefault(row["provider"], row["copy_fraction"])
    if panels:
        title = f"{rows[0]['device']}, {spec} neuron, {rows[0]['date_utc']} UTC"
        bar_chart(path, panels, title=title, value="fraction of copy bandwidth", limit=1.0)


def show_results(rows: Sequence[Row]) -> int:
    """Show the rows as a table; return `exit_code`."""
    show_table(kernel_table(rows))
    return exit_code(rows)


def exit_code(rows: Sequence[Row]) -> int:
    """1 when an op failed its check, else 0."""
    return int(any(row["status"] == "failed check" for row in rows))
