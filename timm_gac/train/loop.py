"""The training loop, on accelerate: it can stop at any step and resume there."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..analysis.evaluate import Evaluation
from .finish import finish
from .gate import watch_gate
from .health import watch_rates
from .options import RunOptions
from .progress import Progress
from .recipes import Recipe
from .run import Run, mixed_seed
from .runlog import write_curve, write_metrics
from .setup import accelerate_state, running

AGREE_EVERY = 10  # updates of the weights


class Trainer:
    """Trains a recipe; set up and ready to `run`.

    Args:
        recipe: Recipe to train.
        options: Where to write, and how often to save.

    Raises:
        ValueError: As for `Run`.

    Attributes:
        state: The run and its progress.
        stop_signal: Number of the signal that asked for a stop, 0 for none.
    """

    def __init__(self, recipe: Recipe, options: RunOptions) -> None:
        self.options = options
        self.state = Run(recipe, options)
        self.recipe, self.accelerator = self.state.recipe, self.state.accelerator
        self.progress = Progress(
            recipe=self.recipe,
            total=self.state.total_steps,
            done=self.state.step,
            visible=self.state.main,
            processes=self.accelerator.num_processes,
        )
        self.stop_signal = 0
        self.minutes_before = self.state.minutes
        self.started = self.saved_at = time.monotonic()

    def run(self) -> int:
        """Train until the end, a signal, or the time limit.

        Returns:
            Exit code: 0 at the end and at the time limit, 128 + signal number where Ctrl-C, SIGTERM or SIGHUP stopped
            the run before.
        """
        try:
            with running(self.accelerator):
                stopped = self._run()
        except OSError as error:
            if "--resume" in str(error):
                raise
            raise OSError(
                error.errno,
                f"the run's files cannot be written to {self.options.out} ({error}): mend that and go on with --resume",
            ) from error
        finally:
            self.state.release()
        return 128 + self.stop_signal if stopped and self.stop_signal else 0

    def _run(self) -> bool:
        """Train; return whether the run was stopped before its end."""
        state = self.state
        self.started = self.saved_at = time.monotonic()
        if self.options.trackers:
            self.accelerator.init_trackers("timm_gac", config=_flat(self.recipe.to_dict()))
        with self.progress:
            with self._signals():
                stopped = self._epochs()
            if stopped:
                self.progress.say(
                    f"stopped at step {state.step} of {state.total_steps} after {state.minutes:.1f} minutes, saved to "
                    f"{self.options.out}: go on with the same options and --resume"
                )
            else:
                finish(state, self.progress.say)
        state.train_step.release()
        if self.options.trackers:
            self.accelerator.end_training()
        return stopped

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and a closed terminal end the run with a checkpoint.

        Only the main thread of a process gets signals. SIGHUP stays ignored where ``nohup`` has it so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if os.name == "posix" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _epochs(self) -> bool:
        """Train the remaining epochs; return whether the run was stopped before its end."""
        state, loaders = self.state, self.state.loaders
        while state.step < state.total_steps:
            epoch, start = divmod(state.step, state.steps_per_epoch)
            without_mixing = epoch >= self.recipe.epochs - self.recipe.mix_off_epochs
            loader = loaders.last if without_mixing and loaders.last is not None else loaders.train
            # Seeded for each epoch and process, so that a resumed run draws the same numbers.
            if start == 0:
                torch.manual_seed(mixed_seed(self.recipe.seed, epoch, self.accelerator.process_index))
            state.set_training()
            for images, targets in loader.batches(epoch, start):
                if self.recipe.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                state.train_step(images, targets, state.step)
                state.step += 1
                self.progress.step(state.step)
                if state.step % self.options.log_steps == 0:
                    self._log()
                # A checkpoint of an epoch's last step has the epoch's row and evaluation behind it.
                if state.step % state.steps_per_epoch and self._saved_to_stop():
                    return True
            self._end_epoch(epoch)
            if state.step < state.total_steps and self._saved_to_stop():
                return True
        return False

    def _saved_to_stop(self) -> bool:
        """Save where a checkpoint is due or the run is to stop; return whether it is to stop."""
        if not self.accelerator.sync_gradients:
            return False  # gradients are being accumulated, which checkpoints do not hold
        stop = self._must_stop()
        if stop or self._checkpoint_due():
            self._save()
        return stop

    def _log(self) -> None:
        state, lr = self.state, self.state.train_step.lr
        loss, match = state.read()
        self._tick()
        self.progress.update(state.step, loss, match, lr)
        self._track({"train/loss": loss, "train/match": match, "train/lr": lr})

    def _track(self, values: dict[str, float]) -> None:
        if self.options.trackers:
            self.accelerator.log(values, step=self.state.step)

    def _tick(self) -> None:
        self.state.minutes = self.minutes_before + (time.monotonic() - self.started) / 60.0

    def _end_epoch(self, epoch: int) -> None:
        state = self.state
        if state.step % self.options.log_steps:
            self._log()
        last = state.step >= state.total_steps
        evaluation = state.test() if last or (epoch + 1) % self.recipe.eval_every == 0 else None
        state.evaluation = evaluation
        self._tick()
        row = self._row(epoch, evaluation)
        state.rows.append(row)
        if evaluation is not None:
            rate = {"firing_rate": evaluation.firing_rate} if evaluation.firing_rates else {}
            self._track({"test/top1": evaluation.top1, "test/loss": evaluation.loss} | rate)
        if state.main:
            write_metrics(self.options.out / "metrics.csv", state.rows)
            if evaluation is not None:
                write_curve(self.options.out / "curve.png", state.rows, self.recipe)
                warnings = watch_rates(self.options.out, epoch + 1, evaluation, state.network)
                warnings += watch_gate(self.options.out, epoch + 1, state.gate, self.recipe)
                for warning in warnings:
                    self.progress.say(warning)
        self.progress.epoch(row, state.minutes)
        if last:
            self._save()

    def _row(self, epoch: int, evaluation: Evaluation | None) -> dict[str, Any]:
        """The row of metrics.csv of an epoch that ended."""
        row = {
            "epoch": epoch + 1,
            "step": self.state.step,
            "lr": f"{self.state.train_step.lr:.6g}",
            "train_loss": f"{self.progress.loss:.5f}",
            "train_match": f"{self.progress.match:.5f}",
            "images_per_s": f"{self.progress.images_per_s:.1f}",
            "minutes": f"{self.state.minutes:.3f}",
        }
        tested = dict.fromkeys(("test_loss", "test_top1", "firing_rate"), "")
        if evaluation is not None:
            tested |= {"test_loss": f"{evaluation.loss:.5f}", "test_top1": f"{evaluation.top1:.5f}"}
            if evaluation.firing_rates:  # an ANN has none
                tested["firing_rate"] = f"{evaluation.firing_rate:.5f}"
        return row | tested

    def _must_stop(self) -> bool:
        limit = self.options.stop_after_minutes * 60.0
        stop = bool(self.stop_signal) or bool(limit and time.monotonic() - self.started >= limit)
        return self._agreed(stop) and self.state.step < self.state.total_steps

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes it: all processes must stop or save at the same step.

        Asking makes the host wait for the device, so several processes ask only every few steps.
        """
        if self.accelerator.num_processes == 1:
            return wish
        if self.state.step // self.recipe.grad_accumulation % AGREE_EVERY:
            return False
        flag = torch.tensor([float(wish)], device=self.state.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _checkpoint_due(self) -> bool:
        if self.options.checkpoint_steps:
            # Rounded up to whole updates of the weights.
            between = -(-self.options.checkpoint_steps // self.recipe.grad_accumulation)
            return self.state.step % (between * self.recipe.grad_accumulation) == 0
        return self._agreed(time.monotonic() - self.saved_at >= self.options.checkpoint_minutes * 60.0)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.stop_signal:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.stop_signal = number

    def _save(self) -> None:
        self._tick()
        if self.state.finite_step != self.state.step:  # else it was checked just now
            self.state.read(reset=False)
        self.saved_at = time.monotonic()
        self.state.save()


def train(recipe: Recipe, options: RunOptions) -> int:
    """Train a recipe and end the process group; returns the exit code, see `Trainer.run`."""
    with accelerate_state():
        return _train(recipe, options)


def _train(recipe: Recipe, options: RunOptions) -> int:
    trainer = Trainer(recipe, options)
    code, state = trainer.run(), trainer.accelerator.state
    # Gloo's threads end when the last object that holds the group, such as DDP, is gone; else they abort Python's exit.
    del trainer
    gc.collect()
    state.destroy_process_group()
    return code


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in values.items()
    }
