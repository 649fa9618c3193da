"""Files of a run besides its weights: config.json, metrics.csv, curve.png, and a row in a table of results."""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch

from gac_kernels import resolve_backend

from ..runtime.dtypes import AUTOCAST
from ..runtime.figures import hide_frame, new_figure
from ..runtime.files import write_csv
from ..runtime.provenance import PROVENANCE, provenance
from .recipes import Recipe

COLUMNS = (
    *("epoch", "step", "lr", "train_loss", "train_match", "test_loss", "test_top1", "firing_rate", "images_per_s"),
    "minutes",
)
RESULT_COLUMNS = (
    *("model", "dataset", "recipe", "top1", "top5", "epochs", "minutes", "images_per_s", "num_steps", "batch_size"),
    *("precision", "reported", "seed", *PROVENANCE, "timm", "accelerate", "eval_dtype", "split", "command"),
)
# Fields that may change on resuming: none changes what is trained.
_FREE = ("data", "data_dir", "num_workers", "eval_every", "stored_dtype")


def environment(device: torch.device, precision: str) -> dict[str, str]:
    """Provenance and versions of the libraries that training depends on.

    Args:
        device: Device of the run.
        precision: Precision of the recipe, on which the backend depends.
    """
    backend = resolve_backend(device, AUTOCAST[precision] or torch.float32)
    versions = {"timm": timm.__version__, "accelerate": accelerate.__version__, "python": platform.python_version()}
    return provenance(device, backend) | versions


def check_same_recipe(file: Path, recipe: Recipe, processes: int) -> None:
    """Refuse to resume a run with another recipe than it began with.

    The number of processes may change if the total batch stays the same: a run of two processes with a ``batch_size``
    of 64 can be resumed by one process with 128.

    Args:
        file: The run's config.json.
        recipe: Recipe to resume with.
        processes: Number of processes to resume with.

    Raises:
        ValueError: The run's config.json is missing or has another recipe.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, processes_before = content["recipe"], int(content["processes"])
        batch_before = processes_before * int(before["batch_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected the run's {file.name} in {str(file.parent)!r}, got none that can be read: put it back, "
            "or begin anew in another --out"
        ) from error
    if batch_before != processes * recipe.batch_size:
        raise ValueError(
            f"expected batches of {batch_before} images in all, as this run began with ({processes_before} processes, "
            f"batch_size {before['batch_size']}), got {processes} x {recipe.batch_size}: give the batch_size that "
            f"makes {batch_before}"
        )
    now, defaults = recipe.to_dict(), Recipe().to_dict()  # for fields that are newer than the run
    free = [*_FREE, "batch_size"]
    if recipe.init is not None:  # which brings them
        free += ["model", "gate", "neuron"]
    if recipe.teacher is not None and before.get("teacher") is not None:  # `check_same_teacher` compares their weights
        free += ["teacher"]
    differing = [name for name in now if name not in free and before.get(name, defaults[name]) != now[name]]
    if differing:
        changes = ", ".join(f"{name}: {before.get(name)!r} became {now[name]!r}" for name in differing)
        raise ValueError(f"expected the recipe that this run began with, got {changes}: give the same options")


def read_metrics(file: Path, up_to_step: int) -> list[dict[str, Any]]:
    """Rows of metrics.csv up to a step; damaged rows, or a file that is no such table, are left out."""
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error):
        return []
    return [row for row in rows if _is_metrics_row(row) and int(row["step"]) <= up_to_step]


def _is_metrics_row(row: dict[Any, Any]) -> bool:
    """Whether a row has the columns, and numbers where `write_curve` draws them."""
    if not {*COLUMNS} <= row.keys() or None in row or None in row.values():  # longer, or shorter
        return False
    if not (row["epoch"] + row["step"]).isdecimal():
        return False
    try:
        [float(row[name]) for name in COLUMNS if row[name] != ""]
    except ValueError:
        return False
    return True


def write_metrics(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.csv, atomically."""
    write_csv(file, COLUMNS, rows)


History = list[tuple[int, list[float]]]  # epoch and values, in the order of the columns


def read_history(file: Path, names: list[str], before: int) -> History:
    """Rows of a table of values by epoch, up to an epoch that is not read any more.

    Args:
        file: The table.
        names: Its columns behind ``epoch``; of a table with others, or one that is missing or cannot be read, there
            are no rows. Damaged rows are left out: no run is lost over a table of what it did.
        before: The first epoch that is left out, as a resumed run writes it anew.
    """
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            header, *rows = [*csv.reader(stream)] or [[]]
    except (UnicodeDecodeError, csv.Error):
        return []
    if header != ["epoch", *names]:
        return []
    history = [read for row in rows if (read := _history_row(row, len(names))) is not None]
    return [(epoch, values) for epoch, values in history if epoch < before]


def _history_row(row: list[str], count: int) -> tuple[int, list[float]] | None:
    """Epoch and values of a row; None of one that is damaged."""
    try:
        epoch, *values = int(row[0]), *map(float, row[1:])
    except (IndexError, ValueError):
        return None
    return (epoch, values) if len(values) == count else None


def write_history(file: Path, names: list[str], history: History, form: str) -> None:
    """Write a table that `read_history` reads, atomically.

    Args:
        file: The table.
        names: Its columns behind ``epoch``.
        history: Its rows.
        form: Format of a value, such as ``.6f``.
    """
    columns = ["epoch", *names]
    rows = [dict(zip(columns, [epoch, *(f"{x:{form}}" for x in values)], strict=True)) for epoch, values in history]
    write_csv(file, columns, rows)


def write_curve(file: Path, rows: list[dict[str, Any]], recipe: Recipe) -> None:
    """Draw training loss, and accuracy on the recipe's ``test`` or ``validation`` split, over epochs."""
    changed = {"mixed": recipe.mixup > 0 or recipe.cutmix > 0, "smoothed": recipe.label_smoothing > 0}
    targets = " and ".join(name for name, is_so in changed.items() if is_so)
    figure = new_figure(8, 3.2)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [int(row["epoch"]) for row in rows]
    loss.plot(epochs, [float(row["train_loss"]) for row in rows], color="#1f77b4")
    loss.set(xlabel="epoch", ylabel="training loss (nats)", title=f"Loss, targets {targets}" if targets else "Loss")
    tested = [row for row in rows if row["test_top1"] not in ("", None)]
    accuracy.plot(
        [int(row["epoch"]) for row in tested],
        [100 * float(row["test_top1"]) for row in tested],
        marker=".",
        color="#d62728",
    )
    accuracy.set(xlabel="epoch", ylabel=f"top-1 on the {recipe.eval_split} set (%)", title="Accuracy")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    hide_frame(loss, accuracy)
    figure.suptitle(f"{recipe.model}, {recipe.dataset}")
    figure.savefig(file)
