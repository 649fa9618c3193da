"""``timm-gac data``: the .npz that the trainer reads, made of a named set or of folders of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..runtime.terminal import plain
from .output import check_new_file, create_console
from .sources import Options

if TYPE_CHECKING:
    from rich.console import Console

CIFAR = ("cifar10", "cifar100")
SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")
SIMILARITY, MAX_SIZE = 0.985, 4096  # as in timm_gac.data.prepare, which imports PyTorch


@dataclass(frozen=True)
class DataConfig:
    """How `run_data` writes a set.

    Args:
        size: Side of the images in pixels: the shorter one is resized to it, and the centre square kept.
        similarity: Training images whose 16 x 16 thumbnail has at least this cosine with a test image's are left out;
            1 keeps all.
        num_workers: Processes that decode.
        overwrite: Replace files that are there.
    """

    size: int = 64
    similarity: float = SIMILARITY
    num_workers: int = 4
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE or self.num_workers < 0:
            raise ValueError(
                f"expected size of at least 1 and up to {MAX_SIZE} and num_workers of at least 0, got {self.size} and "
                f"{self.num_workers}: change them"
            )
        if not 0 < self.similarity <= 1:
            raise ValueError(f"expected similarity above 0 and up to 1, got {self.similarity}: try {SIMILARITY}")


def data(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER... OUT")],
    config: Options[DataConfig],
) -> int:
    """Make the .npz that train reads out of image folders or CIFAR.

    Training images that show what a validation image shows are left out and listed.

    Example: timm-gac data tiny_imagenet tiny-imagenet-200/ tiny_imagenet.npz

    Args:
        name: cifar10 or cifar100 as torchvision keeps it, or as shards of PFLlib, whose official split is found again;
            any other name stands for the folders of images that follow.
        paths: One folder or more (train/CLASS/IMAGE and val/CLASS/IMAGE, or Tiny-ImageNet-200), and the file to write.
        config: Size of the images, and which of them are left out.
    """
    run_data(name, paths, config)
    return 0


def run_data(name: str, paths: tuple[Path, ...], config: DataConfig, console: Console | None = None) -> Path:
    """Write what the trainer reads.

    Args:
        name: cifar10 or cifar100, of which ``paths`` names the folder where torchvision keeps it, or that of PFLlib's
            shards; any other name stands for folders of images, of which there may be several.
        paths: The folders, and last the .npz file to write.
        config: Size of the images, and which of them are left out.
        console: Where the figures go.

    Returns:
        The file.

    Raises:
        ValueError: There are too few or too many paths, the file is there already, or a folder holds no set.
    """
    console = console or create_console()
    if len(paths) < 2 or (name in CIFAR and len(paths) != 2):
        raise ValueError(
            f"expected {'one folder' if name in CIFAR else 'one folder or more'} and the file to write, got "
            f"{len(paths)} paths: such as `timm-gac data {name} FOLDER {name}.npz`"
        )
    *folders, out = paths
    if out.suffix != ".npz":
        raise ValueError(f"expected a file ending in .npz as the last path, got {out.name!r}: such as {name}.npz")
    check_new_file(out, config.overwrite, "OUT")
    if name in CIFAR and (folders[0] / "config.json").is_file():
        _write_shards(name, folders[0], out, console)
    elif name in CIFAR:
        _write_cifar(name, folders[0], out, console)
    else:
        _write_folders(folders, out, config, console)
    return out


def _write_cifar(name: str, folder: Path, out: Path, console: Console) -> None:
    import numpy as np

    from ..data.arrays import load_arrays, save_arrays
    from ..data.labels import known_label_names

    sets = {split: load_arrays(f"torch/{name}", split, data_dir=str(folder)) for split in SPLITS}
    arrays = {"label_names": np.array(sets["train"].label_names or known_label_names(name), str)}
    for split, part in sets.items():
        arrays |= {f"x_{split}": part.images.numpy(), f"y_{split}": part.labels.numpy()}
    save_arrays(out, arrays)
    train, test = (len(sets[split].labels) for split in SPLITS)
    console.print(f"wrote {plain(out)}: {train:,} training and {test:,} test images", markup=False)


def _write_shards(name: str, folder: Path, out: Path, console: Console) -> None:
    import numpy as np

    from ..data.arrays import save_arrays
    from ..data.labels import known_label_names
    from ..data.pictures import join_names
    from ..data.shards import TRAIN_PER_CLASS, read_shards

    names = known_label_names(name)
    found = read_shards(folder, TRAIN_PER_CLASS[name], len(names))
    save_arrays(out, {"label_names": np.array(names, str)} | found.arrays)
    train, test = (len(found.arrays[f"y_{split}"]) for split in SPLITS)
    lost = f"; lost with {join_names(found.missing)}: {found.lost['train']:,} and {found.lost['test']:,}"
    console.print(
        f"wrote {plain(out)}: {train:,} training and {test:,} test images of the official split, which the labels of "
        f"all {found.shards} shards confirm{lost if found.missing else ''}",
        markup=False,
    )


def _write_folders(folders: list[Path], out: Path, config: DataConfig, console: Console) -> None:
    from ..data.pictures import join_names
    from ..data.prepare import beside, prepare_images, source_name

    for file in beside(out, [source_name(folder) for folder in folders]):
        check_new_file(file, config.overwrite, "OUT")
    report = prepare_images(
        folders,
        out,
        size=config.size,
        similarity=config.similarity,
        num_workers=config.num_workers,
        progress=True,
    )
    for title, found in report["found"].items():
        kept = report["kept"].get(title, 0)
        left_out = f", {found - kept:,} left out" if kept < found else ""
        console.print(f"{plain(title)}: {found:,} images{left_out}", markup=False)
    if report["without_training_images"]:
        console.print(f"without training images: {join_names(report['without_training_images'])}", markup=False)
    console.print(
        f"wrote {plain(out)}: {report['classes']} classes at {config.size}x{config.size}; what was left out, and why: "
        f"{plain(out.with_suffix('.json'))}",
        markup=False,
    )
    if len(folders) > 1:
        console.print(f"the test images of each folder: {plain(out.with_suffix('.FOLDER.npz'))}", markup=False)
