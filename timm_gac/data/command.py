"""``timm-gac data``: the .npz of a named set, or of any folders of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from .arrays import load_arrays, save_arrays
from .labels import known_label_names
from .prepare import SIMILARITY, prepare_images

__all__ = ["DataConfig", "run_data"]

CIFAR = ("cifar10", "cifar100")


@dataclass(frozen=True)
class DataConfig:
    """How `run_data` writes a set.

    Args:
        size: Side of the images in pixels: the shorter one is resized to it, and the centre square kept.
        similarity: Training images whose 16 x 16 thumbnail has at least this cosine with a test image's are left out;
            1 keeps all.
        num_workers: Processes that decode.
        overwrite: Replace a file that is there.
    """

    size: int = 64
    similarity: float = SIMILARITY
    num_workers: int = 4
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.num_workers < 0:
            raise ValueError(
                f"expected size of at least 1 and num_workers of at least 0, got {self.size} and {self.num_workers}: "
                "raise them"
            )
        if not 0 < self.similarity <= 1:
            raise ValueError(f"expected similarity above 0 and up to 1, got {self.similarity}: try {SIMILARITY}")


def run_data(name: str, paths: tuple[Path, ...], config: DataConfig, console: Console | None = None) -> Path:
    """Write what the trainer reads.

    Args:
        name: cifar10 or cifar100, of which ``paths`` names the folder where torchvision keeps it; any other name stands
            for folders of images, of which there may be several.
        paths: The folders, and last the .npz file to write.
        config: How.
        console: Where the figures go.

    Returns:
        The file.

    Raises:
        ValueError: There are too few or too many paths, the file is there already, or a folder holds no set.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if len(paths) < 2 or (name in CIFAR and len(paths) != 2):
        raise ValueError(
            f"expected {'one folder' if name in CIFAR else 'one folder or more'} and the file to write, got "
            f"{len(paths)} paths: such as `timm-gac data {name} FOLDER {name}.npz`"
        )
    *folders, out = paths
    if out.suffix != ".npz":
        raise ValueError(f"expected a file ending in .npz as the last path, got {out.name!r}: such as {name}.npz")
    if out.exists() and not config.overwrite:
        raise ValueError(f"expected a new file, got {str(out)!r}, which is there: use --overwrite")
    if name in CIFAR:
        sets = {split: load_arrays(f"torch/{name}", split, data_dir=str(folders[0])) for split in ("train", "test")}
        arrays = {"label_names": np.array(sets["train"].label_names or known_label_names(name), str)}
        for split, part in sets.items():
            arrays |= {f"x_{split}": part.images.numpy(), f"y_{split}": part.labels.numpy()}
        save_arrays(out, arrays)
        counts = {split: len(part.labels) for split, part in sets.items()}
        console.print(f"wrote {out}: {counts['train']:,} training and {counts['test']:,} test images")
        return out
    report = prepare_images(
        folders, out, size=config.size, similarity=config.similarity, num_workers=config.num_workers
    )
    for title, found in report["found"].items():
        kept = report["kept"].get(title, 0)
        console.print(f"{title}: {found:,} images" + (f", {found - kept:,} left out" if kept < found else ""))
    console.print(
        f"wrote {out}: {report['classes']} classes at {config.size}x{config.size}; what was left out, and why: "
        f"{out.with_suffix('.json')}"
    )
    return out
