"""State of a training run: its parts and its progress, and how they are saved and restored."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from ..analysis.evaluate import Evaluation, evaluate, evaluate_state
from ..analysis.gate import GateStatistics
from ..hub.folder import check_storable_config
from ..runtime.collectives import share_tensors
from ..runtime.dtypes import AUTOCAST
from ..runtime.files import check_csv, write_json
from ..runtime.finite import names_not_finite
from .checkpoints import (
    Checkpoint,
    damaged,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from .distill import check_same_teacher, open_teacher
from .fingerprint import check_same_data, describe_data
from .finite import count_not_finite, not_finite, tensors_of
from .gate import GATE_IMAGES, FirstKept, measure_gate
from .lock import RunLock
from .optim import MovingAverage, create_optimizer, freeze_stages
from .options import RunOptions
from .recipes import Recipe
from .runlog import RESULT_COLUMNS, check_same_recipe, environment, read_metrics
from .sets import count_stream_classes, create_loaders, read_sets
from .setup import create_accelerator, create_network, describe_input, prepare, settled, with_brought
from .step import PerStepLogits, TrainStep
from .sync import synchronise_norms


class Run:
    """A run of a recipe on this process; with ``options.resume`` restored from its last checkpoint.

    Args:
        recipe: Recipe to train.
        options: Where to write, and how often to save.

    Raises:
        ValueError: The folder holds a run and ``resume`` is not given, or it holds a run of another recipe or of other
            data; or another trainer writes to it; or the table of results has other columns; or data, model and recipe
            do not fit together.

    Attributes:
        recipe: The recipe as `settled`.
        network: The network; ``model`` is accelerate's wrapper of it.
        teacher: Network that it is distilled from; None if the recipe has none.
        frozen: Names of the network's children that are not trained.
        raw_optimizer: The optimiser; ``optimizer`` is accelerate's wrapper of it.
        average: Moving average of the weights; None if the recipe has none.
        train_step: Runs training steps.
        step: Training steps done.
        minutes: Training time so far.
        rows: Rows of metrics.csv, one per epoch.
        evaluation: Evaluation after the last epoch, None if there was none.
        gate: What the gate did on the first images of the last evaluation; None without a learned gate, and on other
            processes than the main one.
    """

    def __init__(self, recipe: Recipe, options: RunOptions) -> None:
        self.recipe, self.options = recipe, options
        if options.results is not None:  # now, not after hours of training
            check_csv(options.results, RESULT_COLUMNS)
        # One process of a run holds its folder; before accelerate is started RANK tells them apart.
        self._lock = RunLock(options.out) if os.environ.get("RANK", "0") == "0" else None
        try:
            self._set_up()
        except BaseException:
            self.release()
            raise

    def _set_up(self) -> None:
        recipe = self.recipe = settled(self.recipe, self.options.recipe_name, resumed=self.options.resume)
        options = self.options
        found = latest_checkpoint(options.out / "checkpoints")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("expected a CUDA device, got none: give --device cpu, or auto")
        self.accelerator = create_accelerator(recipe, options.out, options.trackers, options.on_cpu)
        _check_folder(options, recipe, found, self.accelerator.num_processes)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        set_seed(recipe.seed)
        torch.backends.cudnn.benchmark = True  # all batches have one shape: the search pays off in a few steps
        self._create_network_and_loaders()
        self._create_optimizer()
        self.step, self.minutes, self.rows = 0, 0.0, list[dict[str, Any]]()
        self.finite_step = 0
        self.evaluation: Evaluation | None = None
        self.gate: GateStatistics | None = None
        self.train_step = TrainStep(
            accelerator=self.accelerator,
            model=self.model,
            optimizer=self.optimizer,
            average=self.average,
            recipe=recipe,
            steps_per_epoch=self.steps_per_epoch,
            threshold=float(self.network.spec.threshold) if hasattr(self.network, "spec") else 0.0,
            teacher=self.teacher,
        )
        if found is not None:
            self._resume(found)
        if self.main:
            write_json(options.out / "config.json", self._config())

    def _create_network_and_loaders(self) -> None:
        recipe = self.recipe
        with self.accelerator.main_process_first():  # it decodes and caches, the others read the cache
            sets = read_sets(recipe, self.main)
        side = recipe.image_size or 224
        if sets is None:
            num_classes, shape = count_stream_classes(recipe), torch.Size((3, side, side))
        else:
            num_classes, shape = sets[0].num_classes, sets[0].images.shape[1:]
        self.network = create_network(recipe, num_classes, shape[0])
        self.recipe = recipe = with_brought(recipe, self.network)
        describe_input(self.network, shape, whole=sets is not None)
        self.frozen = freeze_stages(self.network, recipe.freeze_stages)
        self.loaders = create_loaders(
            recipe=recipe,
            sets=sets,
            num_classes=num_classes,
            cfg=self.network.pretrained_cfg,
            accelerator=self.accelerator,
        )
        check_storable_config(self.network, self.loaders.label_names)
        train, test = (self.loaders.train, self.loaders.test) if sets is None else sets
        self.data = {"train": describe_data(train), recipe.eval_split: describe_data(test)}
        self.network.to(self.device)
        with self.accelerator.main_process_first():  # one process downloads it, the others find it
            self.teacher = open_teacher(
                recipe=recipe,
                given=self.network.pretrained_cfg,
                num_classes=num_classes,
                label_names=self.loaders.label_names,
                device=self.device,
            )

    def _create_optimizer(self) -> None:
        recipe = self.recipe
        self.average = MovingAverage(self.network, recipe.ema_decay) if recipe.ema_decay else None
        wrapped = PerStepLogits(self.network) if recipe.loss == "tet" else self.network
        self.raw_optimizer = create_optimizer(self.network, recipe, self.device, resumed=self.options.resume)
        self.model, self.optimizer = prepare(self.accelerator, recipe, wrapped, self.raw_optimizer)
        if recipe.sync_bn:  # after DDP, which refuses PyTorch's layer on a CPU, where ours works
            synchronise_norms(self.network)
        if self.average is not None:  # the lines above may have replaced tensors
            self.average.follow(self.network)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch."""
        return len(self.loaders.train)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.recipe.epochs * self.steps_per_epoch

    def set_training(self) -> None:
        """Set the network to training mode, its frozen parts to eval mode: their running statistics stay."""
        self.model.train()
        for name in self.frozen:
            self.network.get_submodule(name).eval()

    def read(self, *, reset: bool = True) -> tuple[float, float]:
        """Mean loss and share of matches since the last reset; waits for the device.

        Args:
            reset: Begin new sums.

        Raises:
            NotFiniteError: The loss or a weight, statistic, gradient or number of the optimiser is NaN or infinite.
        """
        broken = count_not_finite((tensor for _, tensor in self._watched()), self.device)
        loss, matches, count = self.train_step.read(broken, reset=reset)
        if count or not (math.isfinite(loss) or math.isnan(matches)):  # without images both are NaN
            epoch = (self.step - 1) // self.steps_per_epoch + 1
            raise not_finite(
                loss=loss,
                names=names_not_finite(self._watched()),
                when=f"between steps {self.finite_step} and {self.step} (epoch {epoch})",
                kept=latest_checkpoint(self.options.out / "checkpoints"),
            )
        self.finite_step = self.step
        return loss, matches

    def _watched(self) -> Iterator[tuple[str, Tensor]]:
        return tensors_of(self.network, None if self.average is None else self.average.state, self.raw_optimizer)

    def release(self) -> None:
        """Free the run's folder for other runs."""
        if self._lock is not None:
            self._lock.release()

    def reported_state(self) -> dict[str, Tensor] | None:
        """The moving average if the recipe reports it; None if it reports the network itself."""
        return self.average.state if self.average is not None and self.recipe.report == "ema" else None

    def lesson(self) -> dict[str, Any]:
        """What config.json and eval.json say of distillation; empty without a teacher, or one of weight 0."""
        if self.teacher is None or not self.recipe.distill_weight:
            return {}
        settings = {name: getattr(self.recipe, f"distill_{name}") for name in ("weight", "temperature")}
        return {"distilled_from": self.teacher.about | settings}

    def test(self) -> Evaluation:
        """Evaluate the network, or its moving average if the recipe reports that, on the test or validation split.

        The main process also measures its ``gate``.
        """
        state = self.reported_state()
        reported = self.network.state_dict() if state is None else state
        share_tensors([reported[name] for name, _ in self.network.named_buffers()])
        # What is seen is kept: asked for a second time a loader that streams would draw random numbers.
        batches = FirstKept(self.loaders.test.batches(0), GATE_IMAGES if self.main else 0)
        with evaluate_state(self.network, state):
            evaluation = evaluate(self.network, batches, amp_dtype=AUTOCAST[self.recipe.precision])
            self.gate = measure_gate(self.network, batches.images)
        return evaluation

    def save(self) -> None:
        """Write a checkpoint; every process takes part."""
        tensors = {f"model.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.average is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.state.items()}
        of_optimizer, plain = optimizer_tensors(self.raw_optimizer)
        tensors |= of_optimizer
        for rank, states in enumerate(gather_object([self._rng()])):
            tensors |= {f"rng.{rank}.{kind}": state for kind, state in states.items()}
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "optimizer": plain,
            "processes": self.accelerator.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(),
            "recipe": self.recipe.to_dict(),
            "data": self.data,
            "teacher": None if self.teacher is None else self.teacher.about,
            "sums": self.accelerator.reduce(self.train_step.sums.clone(), "sum").tolist(),
        }
        if self.main:
            folder = self.options.out / "checkpoints"
            save_checkpoint(folder, self.step, Checkpoint(tensors, state), self.options.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self, found: Path) -> None:
        checkpoint = load_checkpoint(found)
        if self.main and isinstance(checkpoint.state.get("data"), dict):
            check_same_data(checkpoint.state["data"], self.data)
        check_same_teacher(checkpoint.state.get("teacher"), self.teacher)
        try:
            self._restore(checkpoint)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise damaged(found, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        names = names_not_finite(self._watched())
        if names:
            raise damaged(found, f"NaN or infinity in {names[0]}")

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
        else:  # images and augmentation do not depend on the number of processes; dropout does
            torch.manual_seed(mixed_seed(self.recipe.seed, int(state["step"]), index))
        if self.main:  # the saved sums are those of all processes
            self.train_step.sums.copy_(torch.tensor(state["sums"]))
        self.step, self.minutes = int(state["step"]), float(state["minutes"])
        self.finite_step = self.step
        self.rows = read_metrics(self.options.out / "metrics.csv", self.step)

    def _rng(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _config(self) -> dict[str, Any]:
        recipe = self.recipe.to_dict()
        return {
            **recipe,
            "recipe": recipe,
            "recipe_name": self.options.recipe_name,
            "command": self.options.command,
            **environment(self.device, self.recipe.precision),
            "processes": self.accelerator.num_processes,
            "label_names": list(self.loaders.label_names),
            **self.lesson(),
        }


def mixed_seed(*numbers: int) -> int:
    """A seed that differs where any of the numbers does."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return seed


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
