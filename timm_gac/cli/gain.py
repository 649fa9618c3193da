"""``timm-gac gain``: whether some runs are better than others on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .output import create_console
from .sources import Options, check_positive


@dataclass(frozen=True, kw_only=True)
class GainConfig:
    """What `gain` does.

    Args:
        against: Files of the other runs, of the same seeds in the same order.
        draws: Number of resamples.
        seed: Of the draws.
    """

    against: tuple[Path, ...]
    draws: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "draws")
        if self.seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {self.seed}: give another")


def gain(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")],
    config: Options[GainConfig],
) -> int:
    """Compare the accuracy of runs with that of others.

    By a paired bootstrap over seeds and images. And how many of their answers are the same.

    Example: timm-gac gain gac0.npz gac1.npz gac2.npz --against direct0.npz direct1.npz direct2.npz

    Args:
        files: Files that `timm-gac eval --answers` wrote, one a run.
        config: With what, and how.
    """
    import numpy as np

    from ..analysis.bootstrap import paired_bootstrap

    if len(files) != len(config.against) or not files:
        raise ValueError(
            f"expected as many files as --against, at least one, got {len(files)} and {len(config.against)}: pair them"
        )
    read = [read_answers(file) for file in (*files, *config.against)]
    if any(not np.array_equal(labels, read[0][0]) for labels, _ in read):
        raise ValueError("expected the same images in every file, got other labels: evaluate all on one set")
    pairs = list(zip(read[: len(files)], read[len(files) :], strict=True))
    correct = np.stack([answers[:, -1] == labels for labels, answers in read])
    found = paired_bootstrap(correct[: len(files)], correct[len(files) :], config.draws, config.seed)
    console = create_console()
    for title, values in (("these", found.accuracies), ("against", found.against)):
        each = ", ".join(f"{value:.2%}" for value in values)
        spread = f", standard deviation {100 * np.std(values, ddof=1):.2f} points" if len(values) > 1 else ""
        console.print(f"{title:8} mean {np.mean(values):.2%}{spread} ({each})")
    over = f"{found.seeds} seeds and " if found.seeds > 1 else ""
    alike = np.mean([np.mean(one[:, -1] == other[:, -1]) for (_, one), (_, other) in pairs])
    if alike == 1:
        console.print(
            f"gain     none: the files of each pair have the same answers, over {over}{found.images:,} images"
        )
        return 0
    gain, low, high = (f"{100 * value:+.2f}" for value in (found.gain, found.low, found.high))
    console.print(
        f"gain     {gain} points, 95 % interval {low} to {high} points over {over}{found.images:,} images; "
        f"in {found.not_above:.1%} of {config.draws:,} resamples no gain"
    )
    console.print(f"agree    {alike:.2%} of the answers of a pair are the same class")
    return 0


def read_answers(file: Path) -> tuple[Any, Any]:
    """Labels (N,) and classes after each step (N, T) of a file of ``timm-gac eval --answers``.

    Raises:
        ValueError: It is no such file.
    """
    import zipfile

    import numpy as np

    try:
        if file.is_file() and not zipfile.is_zipfile(file):  # NumPy would take it for a pickle
            raise ValueError("it is no .npz file")
        with np.load(file, allow_pickle=False) as content:
            labels, answers = content["labels"], content["answers"]
        if answers.ndim != 2 or labels.shape != answers.shape[:1] or not answers.size:
            raise ValueError(f"labels {labels.shape} and answers {answers.shape}, not (N,) and (N, T)")
        return labels, answers
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected a file of `timm-gac eval --answers`, got {str(file)!r}: {error}") from error
