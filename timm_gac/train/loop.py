"""The training run: one readable loop on accelerate that can stop at any step and go on from there."""

from __future__ import annotations

import gc
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from ..collectives import share_tensors
from ..evaluate import Evaluation, evaluate, evaluate_state
from .checkpoints import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from .finish import finish
from .health import watch_rates
from .optim import MovingAverage, create_optimizer, freeze_stages
from .progress import Progress
from .recipes import Recipe
from .runlog import check_same_recipe, environment, read_metrics, write_curve, write_json, write_metrics
from .setup import create_accelerator, create_loaders, create_network, describe_input, prepare, read_sets
from .step import PerStepLogits, TrainStep
from .sync import synchronise_norms

__all__ = ["RunOptions", "Trainer", "train"]

AGREE_EVERY = 10  # updates of the weights
AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """How and where a recipe is run; nothing here changes what is computed.

    Args:
        out: Folder of the run.
        resume: Go on from the last checkpoint in it.
        stop_after_minutes: Save a checkpoint and stop after so many minutes; 0 for never.
        checkpoint_minutes: Minutes between checkpoints; one is also written at the end of the run and when it is told
            to stop (Ctrl-C, SIGTERM).
        checkpoint_steps: Steps between checkpoints; 0 leaves it to the minutes.
        keep_checkpoints: How many stay.
        trackers: Trackers of accelerate, such as tensorboard.
        results: Table (CSV) to which the finished run adds a row.
        recipe_name: Name under which it appears there.
        log_steps: Steps between two readings of loss and speed.
        cpu: Run on the CPU although there is a GPU.
    """

    out: Path = Path("runs/latest")
    resume: bool = False
    stop_after_minutes: float = 0.0
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    results: Path | None = None
    recipe_name: str = "custom"
    log_steps: int = 50
    cpu: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep_checkpoints", 1), ("log_steps", 1), ("checkpoint_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}: give a larger one")
        for name in ("stop_after_minutes", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}: give minutes, or 0")


class Trainer:
    """A run of a recipe: everything set up, ready to `run`.

    Args:
        recipe: What to compute.
        options: Where, and how often to save.

    Raises:
        ValueError: The folder holds a run and ``resume`` was not given, or holds one of another recipe; or the data,
            the model and the recipe do not fit.
    """

    def __init__(self, recipe: Recipe, options: RunOptions) -> None:
        self.recipe, self.options = recipe, options
        found = latest_checkpoint(options.out / "checkpoints")
        self.accelerator = create_accelerator(recipe, options.out, options.trackers, options.cpu)
        _check_folder(options, recipe, found, self.accelerator.num_processes)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        set_seed(recipe.seed)
        torch.backends.cudnn.benchmark = True  # every training batch has one shape: the search pays in a few steps
        with self.accelerator.main_process_first():  # the first decodes and caches, the others read the cache
            sets = read_sets(recipe, self.main)
        num_classes, in_chans = (1000, 3) if sets is None else (sets[0].num_classes, sets[0].images.shape[1])
        self.network = create_network(recipe, num_classes, in_chans)
        side = recipe.image_size or 224
        shape = (3, side, side) if sets is None else tuple(sets[0].images.shape[1:])
        describe_input(self.network, shape, whole=sets is not None)
        freeze_stages(self.network, recipe.freeze_stages)
        self.loaders = create_loaders(recipe, sets, num_classes, self.network.pretrained_cfg, self.accelerator)
        self.network.to(self.device)
        self.average = MovingAverage(self.network, recipe.ema_decay) if recipe.ema_decay else None
        wrapped = PerStepLogits(self.network) if recipe.loss == "tet" else self.network
        raw_optimizer = create_optimizer(self.network, recipe, self.device)
        model, self.optimizer = prepare(self.accelerator, recipe, wrapped, raw_optimizer)
        if recipe.sync_bn:  # not before: DDP refuses PyTorch's layer on a CPU, where ours works
            synchronise_norms(self.network)
        if self.average is not None:  # preparing and converting may have replaced tensors
            self.average.follow(self.network)
        self.raw_optimizer, self.model = raw_optimizer, model
        self.step, self.minutes, self.rows = 0, 0.0, list[dict[str, Any]]()
        if found is not None:
            self._restore(load_checkpoint(found))
        self.steps_per_epoch = len(self.loaders.train)
        self.train_step = TrainStep(
            self.accelerator, model, self.optimizer, self.average, recipe, self.steps_per_epoch,
            float(self.network.spec.threshold),
        )  # fmt: skip
        if found is not None and self.main:  # sums are of all processes
            self.train_step.sums.copy_(torch.tensor(self._sums))
        self.stop_signal = 0
        self.evaluation: Evaluation | None = None
        if self.main:
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / "config.json", self._config())

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.steps_per_epoch

    def run(self) -> int:
        """Train until the end, a signal, or the time limit.

        Returns:
            Exit code: 0 at the end and at the time limit, 128 + signal number after Ctrl-C or SIGTERM.
        """
        self.started, self.minutes_before = time.monotonic(), self.minutes
        self.saved_at = self.started
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.options.trackers:
            self.accelerator.init_trackers("timm_gac", config=_flat(self.recipe.to_dict()))
        processes = self.accelerator.num_processes
        with Progress(self.recipe, self.total_steps, self.step, self.main, processes) as self.progress:
            try:
                stopped = self._epochs()
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
            if stopped:
                self.progress.say(
                    f"stopped at step {self.step} of {self.total_steps} after {self.minutes:.1f} minutes, saved to "
                    f"{self.options.out}: go on with the same options and --resume"
                )
            else:
                finish(self)
        self.train_step.release()
        if self.options.trackers:
            self.accelerator.end_training()
        return 128 + self.stop_signal if self.stop_signal else 0

    def _epochs(self) -> bool:
        """Go through the epochs that are left; whether the run was stopped before the end."""
        while self.step < self.total_steps:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            calm = self.loaders.last is not None and epoch >= self.recipe.epochs - self.recipe.mix_off_epochs
            loader = self.loaders.last if calm and self.loaders.last is not None else self.loaders.train
            # In distinct states per epoch and process, so that a run that goes on draws what it would have drawn.
            if start == 0:
                torch.manual_seed(_mixed_seed(self.recipe.seed, epoch, self.accelerator.process_index))
            self.model.train()
            for images, targets in loader.batches(epoch, start):
                if self.recipe.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                self.train_step(images, targets, self.step)
                self.step += 1
                if self.step % self.options.log_steps == 0:
                    self._log()
                if not self.accelerator.sync_gradients:
                    continue  # gradients are being added up, and no checkpoint holds those
                if self._must_stop():
                    self._save()
                    return True
                if self._checkpoint_due():
                    self._save()
            self._end_epoch(epoch)
        return False

    def _log(self) -> None:
        loss, match = self.train_step.read()
        self._tick()
        self.progress.update(self.step, loss, match, self.train_step.lr)
        if self.options.trackers:
            values = {"train/loss": loss, "train/match": match, "train/lr": self.train_step.lr}
            self.accelerator.log(values, step=self.step)

    def _tick(self) -> None:
        self.minutes = self.minutes_before + (time.monotonic() - self.started) / 60.0

    def _end_epoch(self, epoch: int) -> None:
        if self.step % self.options.log_steps:
            self._log()
        last = self.step >= self.total_steps
        evaluation = self.test() if last or (epoch + 1) % self.recipe.eval_every == 0 else None
        self._tick()
        row = {
            "epoch": epoch + 1, "step": self.step, "lr": f"{self.train_step.lr:.6g}",
            "train_loss": f"{self.progress.loss:.5f}", "train_match": f"{self.progress.match:.5f}",
            "test_loss": "" if evaluation is None else f"{evaluation.loss:.5f}",
            "test_top1": "" if evaluation is None else f"{evaluation.top1:.5f}",
            "firing_rate": "" if evaluation is None else f"{evaluation.firing_rate:.5f}",
            "images_per_s": f"{self.progress.images_per_s:.1f}", "minutes": f"{self.minutes:.3f}",
        }  # fmt: skip
        self.rows.append(row)
        self.evaluation = evaluation
        if evaluation is not None and self.options.trackers:
            values = {"test/top1": evaluation.top1, "test/loss": evaluation.loss, "firing_rate": evaluation.firing_rate}
            self.accelerator.log(values, step=self.step)
        if self.main:
            write_metrics(self.options.out / "metrics.csv", self.rows)
            if evaluation is not None:
                write_curve(self.options.out / "curve.png", self.rows, f"{self.recipe.model}, {self.recipe.dataset}")
                for warning in watch_rates(self.options.out, epoch + 1, evaluation, self.network):
                    self.progress.say(warning)
        self.progress.epoch(row, self.minutes)
        if last:
            self._save()

    def test(self) -> Evaluation:
        """Evaluate what the recipe reports on the test set."""
        state = self.average.state if self.average is not None and self.recipe.report == "ema" else None
        of_report = self.network.state_dict() if state is None else state
        share_tensors([of_report[name] for name, _ in self.network.named_buffers()])
        with evaluate_state(self.network, state):
            return evaluate(self.network, self.loaders.test.batches(0), amp_dtype=AMP_DTYPES[self.recipe.precision])

    def _must_stop(self) -> bool:
        limit = self.options.stop_after_minutes * 60.0
        stop = bool(self.stop_signal) or bool(limit and time.monotonic() - self.started >= limit)
        return self._agreed(stop) and self.step < self.total_steps

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes it: a process that stops or saves alone leaves the others waiting.

        Asking makes the host wait for the device, so several processes ask each other every few steps only.
        """
        if self.accelerator.num_processes == 1:
            return wish
        if self.step // self.recipe.grad_accumulation % AGREE_EVERY:
            return False
        flag = torch.tensor([float(wish)], device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _checkpoint_due(self) -> bool:
        if self.options.checkpoint_steps:
            # In whole updates of the weights.
            between = -(-self.options.checkpoint_steps // self.recipe.grad_accumulation)
            return self.step % (between * self.recipe.grad_accumulation) == 0
        return self._agreed(time.monotonic() - self.saved_at >= self.options.checkpoint_minutes * 60.0)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.stop_signal:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.stop_signal = number

    def _save(self) -> None:
        self._tick()
        self.saved_at = time.monotonic()
        tensors = {f"model.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.average is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.state.items()}
        of_optimizer, plain = optimizer_tensors(self.raw_optimizer)
        tensors |= of_optimizer
        for rank, states in enumerate(gather_object([self._rng()])):
            tensors |= {f"rng.{rank}.{kind}": state for kind, state in states.items()}
        scaler = self.accelerator.scaler
        state = {
            "step": self.step, "minutes": self.minutes, "optimizer": plain, "processes": self.accelerator.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(), "recipe": self.recipe.to_dict(),
            "sums": self.accelerator.reduce(self.train_step.sums.clone(), "sum").tolist(),
        }  # fmt: skip
        if self.main:
            folder = self.options.out / "checkpoints"
            save_checkpoint(folder, self.step, Checkpoint(tensors, state), self.options.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _rng(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.network.load_state_dict(checkpoint.part("model"))
        if self.average is not None:
            self.average.load(checkpoint.part("ema"))
        restore_optimizer(self.raw_optimizer, checkpoint.part("optimizer"), state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        index = self.accelerator.process_index
        if state["processes"] == self.accelerator.num_processes:
            rng = checkpoint.part(f"rng.{index}")
            torch.set_rng_state(rng["cpu"])
            if self.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        else:  # images, augmentation and pairs are the same with any number of processes; dropout draws others
            torch.manual_seed(_mixed_seed(self.recipe.seed, int(state["step"]), index))
        self._sums = state["sums"]
        self.step, self.minutes = int(state["step"]), float(state["minutes"])
        self.rows = read_metrics(self.options.out / "metrics.csv", self.step)

    def _config(self) -> dict[str, Any]:
        recipe = self.recipe.to_dict()
        return {
            **recipe, "recipe": recipe, "recipe_name": self.options.recipe_name, **environment(self.device),
            "processes": self.accelerator.num_processes, "label_names": list(self.loaders.label_names),
        }  # fmt: skip


def train(recipe: Recipe, options: RunOptions) -> int:
    """Run a recipe and end the process group; the exit code (see `Trainer.run`)."""
    trainer = Trainer(recipe, options)
    code, state = trainer.run(), trainer.accelerator.state
    # Gloo's threads end with the last that holds the group, such as DDP; those that live when Python ends abort it.
    del trainer
    gc.collect()
    state.destroy_process_group()
    return code


def _check_folder(options: RunOptions, recipe: Recipe, found: Path | None, processes: int) -> None:
    if options.resume:
        if found is None:
            raise ValueError(
                f"expected a checkpoint in {str(options.out / 'checkpoints')!r} to resume from, got none: check --out, "
                "or leave --resume out to begin"
            )
        check_same_recipe(options.out / "config.json", recipe, processes)
    elif found is not None or (options.out / "model").exists():
        raise ValueError(
            f"expected an empty folder for a new run, got {str(options.out)!r}, which holds one: give --resume to go "
            "on with it, or another --out"
        )


def _mixed_seed(*numbers: int) -> int:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return seed


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in values.items()
    }
