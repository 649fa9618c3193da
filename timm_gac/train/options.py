"""The trainer's command line: ``RECIPE [--field value]...`` for every field of a recipe and of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .recipes import RECIPES, Recipe, RecipeName

__all__ = ["RecipeName", "RunOptions", "parse"]


@dataclass(frozen=True)
class RunOptions:
    """How and where a recipe is run; none of it changes the result.

    Args:
        out: Folder of the run.
        resume: Resume from the last checkpoint in that folder.
        stop_after_minutes: Save a checkpoint and stop after so many minutes; 0 for never.
        checkpoint_minutes: Minutes between checkpoints; one is also written at the end of the run and on Ctrl-C or
            SIGTERM.
        checkpoint_steps: Steps between checkpoints, instead of minutes; 0 for minutes.
        keep_checkpoints: How many checkpoints to keep.
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
    recipe_name: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "custom"  # RECIPE on a command line
    log_steps: int = 50
    cpu: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep_checkpoints", 1), ("log_steps", 1), ("checkpoint_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}: give a larger one")
        for name in ("stop_after_minutes", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}: give minutes, or 0")


def parse(arguments: Sequence[str], program: str) -> tuple[Recipe, RunOptions]:
    """Recipe and options of a command line; an unknown recipe or field exits with status 2.

    Args:
        arguments: Without the program's name.
        program: Program name shown in the help.

    Raises:
        ValueError: A value is out of range.
    """
    guess = next((word for word in arguments if word in RECIPES), "cifar100")
    name, recipe, options = _parse(arguments, program, RECIPES[guess])
    if name != guess:  # the first such word was a value, as in --dataset cifar10 cifar100
        _, recipe, options = _parse(arguments, program, RECIPES[name])
    return recipe, dataclasses.replace(options, recipe_name=name)


def _parse(arguments: Sequence[str], program: str, defaults: Recipe) -> tuple[str, Recipe, RunOptions]:
    def train(
        recipe: Annotated[RecipeName, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
        options: Annotated[RunOptions, tyro.conf.arg(name="")],
        fields: Annotated[Recipe, tyro.conf.arg(name="")] = defaults,
    ) -> tuple[str, Recipe, RunOptions]:
        """Train a spiking network. RECIPE names a recipe, any of whose fields can be overridden.

        Several GPUs: accelerate launch -m timm_gac.train RECIPE ... Stop at any time (Ctrl-C saves a checkpoint); go on
        with the same command and --resume. It runs on CUDA where there is one; --cpu keeps it on the CPU.

        Example: timm-gac train cifar100_fast --data cifar100.npz --out runs/gac

        Args:
            recipe: cifar10, cifar100, cifar100_fast or imagenet. The defaults shown are those of the recipe given.
            options: How to run it.
            fields: What to change of it.
        """
        return recipe, fields, options

    return tyro.cli(train, prog=program, args=list(arguments))
