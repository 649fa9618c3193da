"""The trainer's command line: ``RECIPE [--field value]...`` for every field of a recipe and of a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .recipes import RECIPES, Recipe, RecipeName

# Tables that a run writes in its folder.
OWN_TABLES = ("metrics.csv", "result.csv", "firing_rates.csv", "gate.csv")


@dataclass(frozen=True)
class RunOptions:
    """How and where a recipe is run; none of it changes the result.

    Args:
        show: Print the recipe's values and end.
        out: Folder of the run.
        resume: Resume from the last checkpoint in that folder.
        stop_after_minutes: Save a checkpoint and stop after so many minutes; 0 for never.
        checkpoint_minutes: Minutes between checkpoints; one is also written at the end of the run, on Ctrl-C or
            SIGTERM, and when the terminal is closed.
        checkpoint_steps: Steps between checkpoints, instead of minutes; 0 for minutes.
        keep_checkpoints: How many checkpoints to keep.
        trackers: Trackers of accelerate, such as tensorboard.
        results: Table (CSV) to which the finished run adds a row.
        recipe_name: Name under which it appears there.
        command: Command line of the run, for that row, with the names alone of files given by absolute path.
        log_steps: Steps between two readings of loss and speed, with a check for NaN and infinity.
        device: auto (CUDA where there is one, else the CPU), cuda or cpu.
        cpu: The same as --device cpu.
    """

    show: bool = False
    out: Path = Path("runs/latest")
    resume: bool = False
    stop_after_minutes: float = 0.0
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    results: Path | None = None
    recipe_name: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "custom"  # RECIPE on a command line
    command: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""  # what `parse` was given
    log_steps: int = 50
    device: str = "auto"
    cpu: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep_checkpoints", 1), ("log_steps", 1), ("checkpoint_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}: give a larger one")
        for name in ("stop_after_minutes", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}: give minutes, or 0")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(
                f"expected device auto, cuda or cpu, got {self.device!r}: choose one; CUDA_VISIBLE_DEVICES chooses GPUs"
            )
        if self.results is not None and self.results.resolve() in [self.out.resolve() / name for name in OWN_TABLES]:
            raise ValueError(
                f"expected a table for --results, got {str(self.results)!r}, a file of the run itself: name another"
            )
        if self.cpu and self.device == "cuda":
            raise ValueError("expected one device, got --cpu and --device cuda: leave one out")

    @property
    def on_cpu(self) -> bool:
        """Whether the options ask for the CPU."""
        return self.cpu or self.device == "cpu"


def parse(arguments: Sequence[str], program: str) -> tuple[Recipe, RunOptions]:
    """Recipe and options of a command line; an unknown recipe or field exits with status 2.

    Args:
        arguments: Without the program's name.
        program: Program name shown in the help.

    Raises:
        ValueError: A value is out of range.
    """
    guess = next((word for word in arguments if word in RECIPES), "cifar100")
    name, recipe, options = _parse(arguments, program, _defaults(guess, arguments))
    if name != guess:  # the first such word was a value, as in --dataset cifar10 cifar100
        _, recipe, options = _parse(arguments, program, _defaults(name, arguments))
    return recipe, dataclasses.replace(options, recipe_name=name, command=_command(program, arguments))


def _command(program: str, arguments: Sequence[str]) -> str:
    """The command line as one types it; of absolute paths the last part, as results are published."""
    words = []
    for word in arguments:
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}")
    return f"{program} {shlex.join(words)}"


def show(name: str, recipe: Recipe) -> str:
    """The values of a recipe, one a line; those that differ from the recipe called ``name`` are marked."""
    usual = RECIPES[name].to_dict() if name in RECIPES else {}
    lines = [f"recipe {name}"]
    for field, value in recipe.to_dict().items():
        changed = field in usual and usual[field] != value
        lines.append(f"  {field:19} {value}" + (f"  (recipe: {usual[field]})" if changed else ""))
    return "\n".join(lines) + "\n"


def _defaults(name: str, arguments: Sequence[str]) -> Recipe:
    """A recipe, for fewer epochs than it ends with unmixed ones with as large a share of these."""
    recipe = RECIPES[name]
    words = [part for word in arguments for part in word.split("=", 1)]
    given = [words[index + 1] for index, word in enumerate(words[:-1]) if word == "--epochs"]
    epochs = int(given[-1]) if given and given[-1].isdecimal() else recipe.epochs
    if not 1 <= epochs < recipe.mix_off_epochs:
        return recipe
    unmixed = epochs * recipe.mix_off_epochs // recipe.epochs
    return dataclasses.replace(recipe, epochs=epochs, mix_off_epochs=unmixed)


def _parse(arguments: Sequence[str], program: str, defaults: Recipe) -> tuple[str, Recipe, RunOptions]:
    def train(
        recipe: Annotated[RecipeName, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
        options: Annotated[RunOptions, tyro.conf.arg(name="")],
        fields: Annotated[Recipe, tyro.conf.arg(name="")] = defaults,
    ) -> tuple[str, Recipe, RunOptions]:
        """Train a spiking network. RECIPE names a recipe, any of whose fields can be overridden.

        Several GPUs: accelerate launch -m timm_gac.train RECIPE ... Stop at any time (Ctrl-C saves a checkpoint); go on
        with the same command and --resume. It runs on CUDA where there is one; --device cpu keeps it on the CPU.
        RECIPE --show prints what a recipe says.

        Example: timm-gac train cifar100_fast --data cifar100.npz --out runs/gac

        Args:
            recipe: digits (a minute on a CPU), cifar10, cifar100, cifar100_fast, tiny_imagenet, in293 (both after
                ..._first) or imagenet. The defaults shown are those of the recipe given.
            options: How to run it.
            fields: What to change of it.
        """
        return recipe, fields, options

    return tyro.cli(train, prog=program, args=list(arguments))
