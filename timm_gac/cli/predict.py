"""``timm-gac predict``: what a network sees in pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.terminal import new_table, plain
from .output import check_new_file, create_console
from .sources import NetworkOptions, Options, check_positive, fold_network, open_pictures, refuse_model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.predict import Prediction

DEFAULT_MODEL = "gac_msresnet18_cifar.cifar100"


@dataclass(frozen=True, kw_only=True)
class PredictConfig(NetworkOptions):
    """What `run_predict` does.

    Args:
        model: Model or run folder, ORG/NAME on the Hub, or a registered name with the tag of its weights.
        top: So many classes a picture.
        per_step: Show the answer after each time step too.
        exit: Stop each picture at the first time step after which its best class has this probability, such as 0.9.
            Its later steps are not computed, except in the encoder.
        batch_size: Pictures a batch.
        precision: float32, or bfloat16 or float16 by autocast. CPUs without instructions for it (AVX512-BF16, AMX) run
            bfloat16 at less than half the speed of float32.
        json: File to write everything to.
        overwrite: Replace that file.
        fold: Fold batch norms into the convolutions, in float32: the same answers up to rounding, sooner.
    """

    model: str = DEFAULT_MODEL
    top: int = 5
    per_step: bool = False
    exit: float | None = None
    batch_size: int = 32
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    overwrite: bool = False
    fold: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "top", "batch_size")
        check_new_file(self.json, self.overwrite)
        if self.exit is not None:
            from ..inference.early_exit import check_confidence

            check_confidence(self.exit)


def predict(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    config: Options[PredictConfig],
) -> int:
    """Show the classes that a network sees in pictures.

    A file that cannot be used is named, and the others are still answered; the status is 1 then.

    Example: timm-gac predict examples/pictures/apple.png --exit 0.9

    Args:
        images: Picture files, and folders of them.
        config: With which network, and what to show.
    """
    return run_predict(images, config)


def list_pictures(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The pictures among files and directories (searched to the bottom), and a sentence for each path without one."""
    from ..data.pictures import SUFFIXES, find_pictures

    found, problems = list[Path](), list[str]()
    for path in paths:
        inside = [*map(Path, find_pictures(path))] if path.is_dir() else [path]
        found += inside
        if not inside:
            problems.append(f"expected pictures in {str(path)!r}, got none of {', '.join(SUFFIXES)}: check the folder")
    return found, problems


def run_predict(paths: Sequence[Path], config: PredictConfig, console: Console | None = None) -> int:
    """Show what a network sees in pictures; a file that cannot be used is named, and the others are answered.

    Returns:
        0, or 1 where a file could not be used.

    Raises:
        ValueError: There is no such network or device, or no path is given.
    """
    if not paths:
        raise ValueError("expected at least one picture or folder of pictures, got none: timm-gac predict IMAGE")
    for path in paths:
        refuse_model_folder(path, f"name pictures, and the network as --model {path}")
    from ..hub import open_network
    from ..inference.predict import Prediction, predict
    from ..runtime.device import resolve_device
    from ..runtime.dtypes import AUTOCAST

    console = console or create_console()
    device = resolve_device(config.device)
    opened = open_network(config.model, config.num_steps, device=device).require_trained()
    names = opened.label_names
    network = fold_network(opened.network, config.precision) if config.fold else opened.network
    steps = f", T={network.num_steps}" if hasattr(network, "spec") else ""  # an ANN has none
    console.print(f"{config.model}{steps}, {network.num_classes} classes", markup=False, soft_wrap=True)
    files, problems = list_pictures(paths)
    results = dict[str, Prediction]()
    for some, images in _batches(files, network, config.batch_size, problems):
        answers = predict(
            network,
            images.to(device),
            top=config.top,
            names=names,
            amp_dtype=AUTOCAST[config.precision],
            exit_at=config.exit,
        )
        for file, prediction in zip(some, answers, strict=True):
            results[str(file)] = prediction
            console.print(_table(file, prediction, names, config))
    for problem in problems:
        console.print(f"skipped: {problem}", markup=False, soft_wrap=True)
    if config.json is not None:
        _write_json(config.json, config, results, problems)
    return 1 if problems else 0


def _if_network(file: Path) -> str:
    """A hint where the name of a network stands among the pictures."""
    from ..hub.open import is_registered

    return f"; for the network of this name give --model {file}" if is_registered(str(file)) else ""


def _batches(
    files: list[Path], network: Any, batch_size: int, problems: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of the files that can be read; sentences about the others are added to ``problems``."""
    import torch

    good, rows = list[Path](), list[Any]()
    for file in files:
        try:
            rows.append(open_pictures([file], network))
            good.append(file)
        except ValueError as error:
            problems.append(f"{error}{_if_network(file)}")
        if len(good) == batch_size:
            yield good, torch.cat(rows)
            good, rows = [], []
    if good:
        yield good, torch.cat(rows)


def _table(file: Path, prediction: Prediction, names: Sequence[str], config: PredictConfig) -> Table:
    from ..inference.predict import class_name

    table = new_table(str(file), ["class"], ["confidence"], no_wrap=False)
    for name, confidence in zip(prediction.names, prediction.confidences, strict=True):
        table.add_row(Text(plain(name)), f"{confidence:.2%}")
    if config.exit is not None:
        table.add_section()
        exit_at = f"exit after {prediction.steps} of {prediction.num_steps} steps: {prediction.names[0]}"
        table.add_row(Text(plain(exit_at)), f"{prediction.confidences[0]:.2%}")
    if config.per_step:
        table.add_section()
        for step, (number, confidence) in enumerate(prediction.per_step, start=1):
            answer = f"after {step} of {prediction.num_steps} steps: {class_name(number, names)}"
            table.add_row(Text(plain(answer)), f"{confidence:.2%}")
    return table


def _write_json(file: Path, config: PredictConfig, results: dict[str, Prediction], problems: list[str]) -> None:
    from ..runtime.files import write_json

    content = {
        "model": config.model,
        "exit": config.exit,
        "pictures": {
            name: asdict(row)
            | {"per_step": [{"class": number, "confidence": confidence} for number, confidence in row.per_step]}
            for name, row in results.items()
        },
        "skipped": problems,
    }
    write_json(file, content)
