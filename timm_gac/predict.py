"""What a network sees in pictures: its best classes, how sure it is, and what it would have said after each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .device import resolve_device
from .early_exit import check_confidence, forward_early_exit
from .hub import open_network
from .runtime.dtypes import AUTOCAST
from .runtime.files import write_json
from .sources import PICTURES, open_pictures

__all__ = ["PredictConfig", "Prediction", "predict", "run_predict"]

Precision = Literal["float32", "bfloat16", "float16"]
DEFAULT_MODEL = "gac_msresnet18_cifar.cifar100"


@dataclass(frozen=True)
class Prediction:
    """A network's answer to one picture.

    Attributes:
        classes: The best classes, the most probable first.
        names: Their names; the number as text where a class has none.
        confidences: Their softmax probabilities.
        per_step: Best class and its confidence by the mean logits of the first t steps, for each step that ran.
        steps: Time steps that ran: where the picture left, with early exit.
        num_steps: T of the network.
    """

    classes: tuple[int, ...]
    names: tuple[str, ...]
    confidences: tuple[float, ...]
    per_step: tuple[tuple[int, float], ...]
    steps: int
    num_steps: int


@torch.no_grad()
def predict(
    model: Any,
    images: Tensor,
    *,
    top: int = 5,
    names: Sequence[str] = (),
    amp_dtype: torch.dtype | None = None,
    exit_at: float | None = None,
) -> list[Prediction]:
    """The answers of a network in eval mode.

    Args:
        model: With ``forward_steps``.
        images: (B, C, H, W), prepared as the network wants them, on its device.
        top: So many classes each, or as many as there are.
        names: Of the classes, in order; () where unknown.
        amp_dtype: Autocast to this dtype.
        exit_at: Early exit at this confidence, see `forward_early_exit`; None for all time steps.

    Raises:
        ValueError: The model has no per-step logits, ``top`` is below 1, or ``exit_at`` is outside (0, 1].
    """
    if not hasattr(model, "forward_steps"):
        raise ValueError(f"expected a model with forward_steps, got {type(model).__name__}: use one of this package")
    if top < 1:
        raise ValueError(f"expected top of at least 1, got {top}: raise it")
    amp = torch.autocast(images.device.type, amp_dtype) if amp_dtype is not None else nullcontext()
    with amp:
        if exit_at is None:
            return answers(model.forward_steps(images), top, names)
        rows = forward_early_exit(model, images, exit_at)
    return [answers(row[None], top, names, model.num_steps)[0] for row in rows]


def answers(logits: Tensor, top: int, names: Sequence[str] = (), num_steps: int | None = None) -> list[Prediction]:
    """Predictions from logits of the steps that ran, (B, steps, classes), of a network of ``num_steps`` if more."""
    steps = torch.arange(1, logits.shape[1] + 1, device=logits.device)[:, None]
    probabilities = (logits.double().cumsum(1) / steps).softmax(-1)
    best, classes = probabilities[:, -1].topk(min(top, logits.shape[-1]))
    step_best, step_classes = probabilities.max(-1)
    rows = zip(classes.tolist(), best.tolist(), step_classes.tolist(), step_best.tolist(), strict=True)
    return [
        Prediction(
            tuple(chosen), tuple(_name(number, names) for number in chosen), tuple(sure),
            tuple(zip(after, how_sure, strict=True)), len(after), num_steps or len(after),
        )
        for chosen, sure, after, how_sure in rows
    ]  # fmt: skip


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


@dataclass(frozen=True)
class PredictConfig:
    """What `run_predict` does.

    Args:
        model: Registered name.tag, model or run folder, or ORG/NAME on the Hub.
        top: So many classes a picture.
        per_step: Show the answer after each time step too.
        exit: Stop each picture at the first time step after which its best class is this probable, such as 0.9. Its
            later steps are then not computed at all; only the encoder always runs for all steps, and for a picture its
            convolutions run just once for them.
        num_steps: Number of time steps T; the network's own where left out.
        batch_size: Pictures a batch.
        precision: float32, or bfloat16 or float16 by autocast.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
        json: File to write everything to.
    """

    model: str = DEFAULT_MODEL
    top: int = 5
    per_step: bool = False
    exit: float | None = None
    num_steps: int | None = None
    batch_size: int = 32
    precision: Precision = "float32"
    device: str = "auto"
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}: raise it")
        if self.exit is not None:
            check_confidence(self.exit)


def find_pictures(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The pictures among files and directories (searched to the bottom), and a sentence for each path without one."""
    found, problems = list[Path](), list[str]()
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        found += inside
        if not inside:
            problems.append(f"expected pictures in {str(path)!r}, got none of {', '.join(PICTURES)}: check the folder")
    return found, problems


def run_predict(paths: Sequence[Path], config: PredictConfig, console: Console | None = None) -> int:
    """Show what a network sees in pictures; a bad file is one sentence, and the others still run.

    Returns:
        0, or 1 where a file could not be used.

    Raises:
        ValueError: There is no such network or device.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    device = resolve_device(config.device)
    opened = open_network(config.model, config.num_steps, device=device).require_trained()
    network, names = opened.network, opened.label_names
    files, problems = find_pictures(paths)
    results = dict[str, Prediction]()
    for some, images in _batches(files, network, config.batch_size, problems):
        options: dict[str, Any] = {"top": config.top, "names": names, "amp_dtype": AUTOCAST[config.precision]}
        options["exit_at"] = config.exit
        for file, prediction in zip(some, predict(network, images.to(device), **options), strict=True):
            results[str(file)] = prediction
            console.print(_table(file, prediction, names, config))
    for problem in problems:
        console.print(f"skipped: {problem}", markup=False)
    if config.json is not None:
        _write_json(config.json, config, results, problems)
    return 1 if problems else 0


def _batches(
    files: list[Path], network: Any, batch_size: int, problems: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of the files that can be read; sentences about the others are added to ``problems``."""
    good, rows = list[Path](), list[Tensor]()
    for file in files:
        try:
            rows.append(open_pictures([file], network))
            good.append(file)
        except ValueError as error:
            problems.append(str(error))
        if len(good) == batch_size:
            yield good, torch.cat(rows)
            good, rows = [], []
    if good:
        yield good, torch.cat(rows)


def _table(file: Path, prediction: Prediction, names: Sequence[str], config: PredictConfig) -> Table:
    from rich.box import SIMPLE_HEAD

    table = Table(title=str(file), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    table.add_column("confidence", justify="right")
    for name, confidence in zip(prediction.names, prediction.confidences, strict=True):
        table.add_row(name, f"{confidence:.2%}")
    if config.exit is not None:
        table.add_section()
        exit_at = f"exit after {prediction.steps} of {prediction.num_steps} steps"
        table.add_row(f"{exit_at}: {prediction.names[0]}", f"{prediction.confidences[0]:.2%}")
    if config.per_step:
        table.add_section()
        for step, (number, confidence) in enumerate(prediction.per_step, start=1):
            table.add_row(f"after {step} of {prediction.num_steps} steps: {_name(number, names)}", f"{confidence:.2%}")
    return table


def _write_json(file: Path, config: PredictConfig, results: dict[str, Prediction], problems: list[str]) -> None:
    content = {
        "model": config.model,
        "exit": config.exit,
        "pictures": {
            name: {
                "classes": list(row.classes), "names": list(row.names), "confidences": list(row.confidences),
                "per_step": [{"class": number, "confidence": sure} for number, sure in row.per_step],
                "steps": row.steps, "num_steps": row.num_steps,
            }
            for name, row in results.items()
        },
        "skipped": problems,
    }  # fmt: skip
    write_json(file, content)
