"""How far a long piece of work is: a bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 30.0  # between two plain lines


@contextmanager
def progress_of(
    task: str, total: int, *, visible: bool = True, console: Any = None, seconds: float = SECONDS
) -> Iterator[Callable[[int], None]]:
    """Show how much of something is done, on the standard error output unless another console is given.

    Args:
        task: What is done, such as ``decoding images``.
        total: How many items there are.
        visible: Show it at all.
        console: A rich console; its bar vanishes in the end. Off a terminal, plain lines go to the standard error
            output, so that what a command prints stays clean.
        seconds: Between two lines off a terminal; work that is done before then writes none.

    Returns:
        A context that gives a function, to be called with the number of items done since the last call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    if not visible:
        yield lambda count: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            row = bar.add_task(task, total=total)
            yield lambda count: bar.advance(row, count)
    else:
        yield _lines(task, total, seconds)


def _lines(task: str, total: int, seconds: float) -> Callable[[int], None]:
    started = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said < seconds:
            return
        said = now
        left = (now - started) / max(done, 1) * max(total - done, 0)
        sys.stderr.write(f"{task}: {done:,} of {total:,}, {now - started:.0f} s, about {left:.0f} s left\n")

    return advance
