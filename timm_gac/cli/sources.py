"""What MODEL, --data and --device mean, in every command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PICTURES",
    "AnyNetworkOptions",
    "DataOptions",
    "Model",
    "NetworkOptions",
    "SetOptions",
    "TrainedModel",
    "check_new_files",
    "check_positive",
    "open_images",
    "open_labelled",
    "open_pictures",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NAMES = (
    "Model or run folder, ORG/NAME on the Hub, or a registered name (`timm-gac models`) with the tag of its weights"
)
TrainedModel = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="MODEL", help=f"{_NAMES}, such as gac_msresnet18_cifar.cifar100."),
]
Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL",
        help=f"{_NAMES}; without a tag for random weights, whose batch norms take the statistics of the images.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """How a network is run.

    Args:
        num_steps: Number of time steps T; the network's own where left out.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
    """

    num_steps: int | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class AnyNetworkOptions(NetworkOptions):
    """How a network is run whose weights may be random.

    Args:
        seed: Seed of random weights, used for a registered name without a tag.
    """

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """Which part of a data set is taken.

    Args:
        data_dir: Folder of the data set, for timm's names.
        split: Split of the data set.
    """

    data_dir: str | None = None
    split: Literal["train", "test"] = "test"


@dataclass(frozen=True, kw_only=True)
class DataOptions(SetOptions):
    """A labelled data set.

    Args:
        data: An .npz file, digits, or the name of a data set in timm, such as torch/cifar100, hfds/cifar100 or folder.
    """

    data: str


def check_positive(config: object, *names: str) -> None:
    """Refuse numbers below 1; None is none.

    Raises:
        ValueError: One of these fields is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}: raise it")


def check_new_files(folder: Path | None, names: Iterable[str], overwrite: bool) -> None:
    """Refuse to replace files.

    Args:
        folder: Where they will be written; None for nowhere.
        names: Their names.
        overwrite: Whether they may be replaced.

    Raises:
        ValueError: One of them is there and ``overwrite`` is not set.
    """
    existing = [] if folder is None or overwrite else [folder / name for name in names if (folder / name).exists()]
    if existing:
        raise ValueError(f"expected a folder without {existing[0]}, got one with it: use --overwrite")


def open_pictures(files: Iterable[Path], model: Any) -> Tensor:
    """Picture files as a network's input ``(N, C, H, W)``, resized, cropped and normalised as timm does.

    Raises:
        ValueError: A file is missing or no picture, or the network takes neither grey nor colour pictures.
    """
    import timm.data
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"expected a network for 1 or 3 channels, got one for {channels}: give arrays as --data")
    transform: Any = timm.data.create_transform(**config, is_training=False)
    rows = []
    for file in files:
        try:
            with Image.open(file) as picture:
                rows.append(transform(ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")))
        except FileNotFoundError as error:
            raise ValueError(f"expected a picture, got {str(file)!r}, which is not there: check the path") from error
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"expected a picture, got {str(file)!r}, which cannot be read as one: {error}") from error
    if not rows:
        raise ValueError("expected at least one picture, got none: name a file")
    return torch.stack(rows)


def open_images(
    data: str, model: Any, limit: int, data_dir: str | None = None, split: Literal["train", "test"] = "test"
) -> Tensor:
    """At most ``limit`` images of a data set as a network's input ``(N, C, H, W)``, evenly spread over the set.

    Args:
        data: A picture, a folder of pictures, or what `load_arrays` takes.
        model: The network they are for.
        limit: At most so many.
        data_dir: Folder of the data set, for timm's names.
        split: Of a data set.

    Raises:
        ValueError: There are no such images, or they have other channels than the network takes.
    """
    if limit < 1:
        raise ValueError(f"expected at least 1 image, got {limit}: raise it")
    path = Path(data)
    if path.is_dir() or path.suffix.lower() in PICTURES:
        found = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURES) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"expected pictures in {data!r}, got none of {', '.join(PICTURES)}: check the folder")
        return open_pictures(_spread(found, limit), model)
    return open_labelled(data, model, limit, data_dir, split)[0]


def open_labelled(
    data: str, model: Any, limit: int, data_dir: str | None = None, split: Literal["train", "test"] = "test"
) -> tuple[Tensor, Tensor]:
    """At most ``limit`` images of a data set, evenly spread over the set, with their labels ``(N,)``.

    Args:
        data: What `load_arrays` takes.
        model: The network they are for.
        limit: At most so many.
        data_dir: Folder of the data set, for timm's names.
        split: Of a data set.

    Raises:
        ValueError: There is no such set, or it has other channels than the network takes.
    """
    import torch

    from ..data import load_arrays
    from ..data.transforms import Normalizer

    if limit < 1:
        raise ValueError(f"expected at least 1 image, got {limit}: raise it")
    cfg = model.pretrained_cfg
    channels, height, _ = cfg["input_size"]
    arrays = load_arrays(data, split, data_dir=data_dir, image_size=height)
    if arrays.images.shape[1] != channels:
        raise ValueError(
            f"expected images of {channels} channels, got {arrays.images.shape[1]} in {data!r}: choose others"
        )
    chosen = torch.tensor(_spread(list(range(len(arrays.images))), limit))
    normalise = Normalizer(cfg["mean"], cfg["std"], torch.device("cpu"), torch.float32)
    return normalise(arrays.images[chosen]), arrays.labels[chosen]


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` of the items, from all over the list: sets are often sorted by class."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]
