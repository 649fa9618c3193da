"""Shared by all benchmarks: timing, memory, tables of rows, time limits."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.files import append_csv
from ..runtime.terminal import new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, Any]
# Larger than the L2 cache of any GPU (50 MB on an H100), so that no repetition finds its input there.
FLUSH_BYTES = 256 * 2**20
NOTE_WIDTH = 40  # columns of a table's notes, which are folded


@dataclass(frozen=True)
class Timing:
    """Median and spread of repeated runs, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repetitions: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        """Summarise one time per repetition."""
        ordered = sorted(times_ms)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def measure_time(
    function: Callable[[], object], device: torch.device, *, target_ms: float = 100.0, warmup_ms: float = 25.0
) -> Timing:
    """Time a function that is already compiled: median and spread of many repetitions.

    On a CUDA device events before and after each repetition measure it. Before each repetition a buffer larger than the
    L2 cache is written, so that no input is cached; the op then pays for evicting that buffer's lines and is spared the
    eviction of its own. The stream then sleeps for about 3 ms, so that the host has launched the function by then and
    launch overhead is not measured. On a CPU the clock is ``time.perf_counter``.

    Args:
        function: Function to time; its result is dropped.
        device: Device it runs on.
        target_ms: Total time of the timed repetitions, of which there are 10 to 1000.
        warmup_ms: Total time of the repetitions before.
    """
    function()
    if device.type != "cuda":
        estimate = _perf_counter_ms(function)
        for _ in range(min(100, int(warmup_ms / estimate))):
            function()
        return Timing.of([_perf_counter_ms(function) for _ in range(_repetitions(target_ms, estimate))])
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    estimate = statistics.median(_event_ms(function, flush, 3))
    _event_ms(function, flush, min(1000, int(warmup_ms / estimate)))
    return Timing.of(_event_ms(function, flush, _repetitions(target_ms, estimate)))


def _repetitions(target_ms: float, estimate_ms: float) -> int:
    return max(10, min(1000, int(target_ms / max(estimate_ms, 1e-3))))


def _perf_counter_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return max(1e3 * (time.perf_counter() - start), 1e-6)


def _event_ms(function: Callable[[], object], flush: torch.Tensor, repetitions: int) -> list[float]:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        torch.cuda._sleep(6_000_000)  # cycles: about 3 ms, longer than autograd takes to launch a step
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(flush.device)
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def measure_copy(size: int, dtype: torch.dtype, device: torch.device, *, target_ms: float = 100.0) -> Timing:
    """Time an out-of-place copy of ``size`` random elements, which reads and writes each once."""
    source = torch.randn(size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return measure_time(lambda: target.copy_(source), device, target_ms=target_ms)


def measure_peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Peak device memory during a call, less what was allocated before it; None on a CPU, which does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass saves for its backward pass, without its own output.

    Tensors that share a storage count once. Saved inputs count too, as the graph keeps them alive.
    """
    storages: dict[int, int] = {}
    keep: list[torch.Tensor] = []  # an address is unique only while its tensor lives

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    storages.pop(output.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Row], keep_bytes: int | None = None) -> None:
    """Append rows to a table, floats with six digits; see `timm_gac.runtime.files.append_csv`.

    Args:
        path: The file; its folder is created if missing.
        columns: The header, in order.
        rows: Each row as a mapping from column to value.
        keep_bytes: Truncate the file to this size first.

    Raises:
        ValueError: The file has another header.
    """
    rounded = [
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    append_csv(path, columns, rounded, keep_bytes)


def rows_table(rows: Sequence[Row], columns: dict[str, str], title: str) -> Table:
    """A rich table of some columns of the rows; what several rows all have in common stands in its title.

    Args:
        rows: Each row as a mapping from column to value.
        columns: Column name to a format specification such as ``.3f``; an empty one for text. One that is empty in all
            rows is left out.
        title: Printed above the table.
    """
    cells = {
        name: ["" if row[name] is None else format(row[name], form) for row in rows] for name, form in columns.items()
    }
    found = {name: {cell for cell in column if cell} for name, column in cells.items()}
    common = [name for name in columns if len(rows) > 1 and name != "note" and len(found[name]) == 1]
    shown = [name for name in columns if found[name] and name not in common]
    return _table_of(
        ", ".join([title, *(f"{name.replace('_', ' ')} {found[name].pop()}" for name in common)]),
        {name: cells[name] for name in shown},
        {name for name in shown if columns[name]},
    )


def _table_of(title: str, cells: Mapping[str, Sequence[Any]], numbers: Container[str]) -> Table:
    table = new_table(title)
    for name in cells:
        table.add_column(
            name.replace("_", "\n"),  # word below word: the entries are short
            justify="right" if name in numbers else "left",
            overflow="fold",
            max_width=NOTE_WIDTH if name == "note" else None,
        )
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def show_table(table: Table) -> None:
    """Print a table to the standard output; on a terminal without the last columns where they have no room."""
    from rich.console import Console

    console = Console(highlight=False)
    # Off a terminal rich assumes 80 columns and would fold every cell of a log.
    console.width = console.width if console.is_terminal else 220
    table, left_out = fit_table(table, console)
    title, table.title = table.title, None
    console.print(title or "")  # in the table it would be folded to the width of that
    console.print(table)
    if left_out:
        console.print(f"no room for {', '.join(left_out)}: see --csv, or take a wider terminal", soft_wrap=True)


def fit_table(table: Table, console: Console) -> tuple[Table, list[str]]:
    """Leave out columns of a `rows_table`, the last first, until no entry has to be folded.

    What is text says which row it is, and the first two numbers what it is about: they stay. So does a note that may
    say why the status of a row is another than that of the rest.

    Returns:
        The table, and headings of the columns left out, in their order.
    """
    from rich.measure import Measurement

    cells = {str(column.header).replace("\n", "_"): [*column.cells] for column in table.columns}
    numbers = [name for name, column in zip(cells, table.columns, strict=True) if column.justify == "right"]
    others = numbers[2:] + ["note"] * ("note" in cells and "status" not in cells)
    left_out: list[str] = []
    unbounded = console.options.update(max_width=10_000)
    while others and Measurement.get(console, unbounded, table).maximum > console.width:
        name = others.pop()
        left_out.insert(0, name.replace("_", " "))
        del cells[name]
        table = _table_of(str(table.title), cells, numbers)
    return table, left_out


def first_error(error: BaseException) -> str:
    """First line of the first error: a failed graph capture raises a second one when it ends."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM, which ``timeout`` sends, into SystemExit within the block, so that results can be written."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` inside the block after so many seconds; infinity is no limit.

    The limit is a Unix signal, which Python handles between two bytecode instructions: a long compilation ends soon, a
    single long call into C++ only when it returns. There is no limit outside of the main thread and on Windows.
    """
    timed = math.isfinite(seconds) and hasattr(signal, "setitimer")
    if not timed or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)  # repeated, in case an `except Exception` catches it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
