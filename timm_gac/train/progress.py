"""Progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..hub.config import is_ann
from .recipes import Recipe

_SPOKEN_AFTER = 10.0  # seconds without a line of an epoch, after which one says how long the run takes


class _Console(Console):
    """A console that does not end the process when its reader has gone, as rich's own does."""

    def on_broken_pipe(self) -> None:
        """Raise the error that is being handled."""
        raise


class Progress:
    """Progress of a run, which goes on where nothing can be shown: the reader of a pipe has gone, the disk is full.

    So it is with ``| tee log``, which Ctrl-C ends sooner than the run has written its checkpoint.

    Args:
        recipe: Recipe of the run.
        total: Steps of the whole run.
        done: Steps done before.
        visible: Whether this process shows it.
        processes: Number of processes that train.
    """

    def __init__(self, recipe: Recipe, total: int, done: int, visible: bool, processes: int = 1) -> None:
        self.recipe, self.total = recipe, total
        self._images_per_step = recipe.batch_size * processes
        self.loss = self.match = float("nan")
        self.images_per_s = 0.0
        self._console = _Console(quiet=not visible, soft_wrap=True)
        self._last = (time.monotonic(), done)
        self._first: tuple[float, int] | None = None  # when the first step was done
        self._silent = True
        self._accuracy = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, disable=not (visible and self._console.is_terminal))
        steps = "" if is_ann(recipe.model) else f", T={recipe.num_steps}"
        self._task = self._bar.add_task(f"{recipe.model}{steps}", total=total, completed=done)

    def __enter__(self) -> Progress:
        self._show(self._bar.start)
        return self

    def __exit__(self, *_: object) -> None:
        self._show(self._bar.stop)

    def _show(self, show: Callable[[], object]) -> None:
        try:
            show()
        except OSError as error:
            self._console.quiet = True
            with contextlib.suppress(OSError, ValueError):  # else Python's own flush in the end would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"no output any more ({error.strerror}): the run goes on, see metrics.csv\n")

    def say(self, text: str) -> None:
        """Show a line of text."""
        self._show(lambda: self._console.print(text, highlight=False, markup=False))

    def step(self, step: int) -> None:
        """Say once, where the first epoch is slow, how long the run takes; the first step, which prepares, is left out.

        Args:
            step: Steps done.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        elif self._silent and now - self._first[0] >= _SPOKEN_AFTER:
            self._silent = False
            seconds = (now - self._first[0]) / (step - self._first[1])
            minutes = seconds * (self.total - step) / 60
            self.say(f"step {step:,} of {self.total:,}: {seconds:.2g} s a step, about {minutes:,.0f} min left")

    def update(self, step: int, loss: float, match: float, lr: float) -> None:
        """Show loss and share of matches since the last update."""
        now = time.monotonic()
        before, done = self._last
        if step > done:
            self.images_per_s = (step - done) * self._images_per_step / max(now - before, 1e-9)
        self._last, self.loss, self.match = (now, step), loss, match
        text = f"loss {loss:.3f}, match {match:.1%}, {self.images_per_s:,.0f} img/s{self._accuracy}"
        self._show(lambda: self._bar.update(self._task, completed=step, description=text))

    def epoch(self, row: dict[str, Any], minutes: float) -> None:
        """Show the row of metrics.csv of an epoch."""
        self._silent = False
        test = ""
        if row["test_top1"]:
            self._accuracy = f", top-1 {float(row['test_top1']):.2%}"
            if row["firing_rate"]:
                self._accuracy += f", firing rate {float(row['firing_rate']):.3f}"
            test = self._accuracy
        left = minutes / max(row["step"], 1) * (self.total - row["step"])
        self.say(
            f"epoch {row['epoch']}/{self.recipe.epochs}: loss {self.loss:.3f}, match {self.match:.1%}, lr {row['lr']}, "
            f"{self.images_per_s:,.0f} img/s, {minutes:.1f} min, {left:.0f} min left{test}"
        )
        self._last = (time.monotonic(), row["step"])  # speed is measured without the evaluation
