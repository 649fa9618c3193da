"""What MODEL, --data and --device mean, in every command."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from ..hub import OpenedNetwork

T = TypeVar("T")
# A dataclass whose fields are options of a command, without a prefix.
Options = Annotated[T, tyro.conf.arg(name="")]
_logger = logging.getLogger(__name__)
_NAMES = (
    "Model or run folder, ORG/NAME on the Hub, or a registered name (`timm-gac models`) with the tag of its weights"
)
_Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
TrainedModel = Annotated[_Name, tyro.conf.arg(help=f"{_NAMES}, such as gac_msresnet18_cifar.cifar100.")]
Model = Annotated[
    _Name,
    tyro.conf.arg(
        help=f"{_NAMES}; without a tag for random weights, whose batch norms take the statistics of the images."
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
    """Refuse numbers below 1 in these fields; None is accepted.

    Raises:
        ValueError: One of these fields is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}: raise it")


def check_costs(name: str) -> None:
    """Refuse an unknown cost table.

    Raises:
        ValueError: There is none of this name.
    """
    from ..energy.tables import cost_table

    cost_table(name)


def open_calibrated(model: str, data: str, config: Any, what: str) -> tuple[OpenedNetwork, list[Tensor]]:
    """A network and images for it in batches on its device, whose batch-norm statistics random weights get.

    Args:
        model: As for `timm_gac.hub.open_network`.
        data: As for `open_images`.
        config: `AnyNetworkOptions` and `SetOptions`, with ``images`` and ``batch_size``.
        what: For what a spiking network is wanted, in words.

    Raises:
        ValueError: There is no such network, image or device, or it is an ANN.
    """
    from ..hub import open_network
    from ..runtime.device import resolve_device

    device = resolve_device(config.device)
    opened = open_network(model, config.num_steps, config.seed, device).require_spiking(what)
    images = open_images(data, opened.network, config.images, config.data_dir, config.split)
    batches = [batch.to(device) for batch in images.split(config.batch_size)]
    opened.calibrate_untrained(batches)
    return opened, batches


def fold_network(network: Any, precision: str) -> Any:
    """Fold a network's batch norms into its convolutions where that gives the same answers up to rounding, and say so.

    That is in float32. In 16 bits the folded weights would be rounded to others than the published figures were
    measured with; an ANN, a quantised or an already folded network is left as it is.
    """
    from ..inference.fold import fuse_for_inference
    from ..models import ANNResNet

    if precision != "float32" or getattr(network, "inference_only", False) or isinstance(network, ANNResNet):
        return network
    try:
        folded = fuse_for_inference(network)
    except ValueError as error:
        _logger.info("the network runs as it is: %s", error)
        return network
    _logger.info("batch norms are folded into convolutions: the same answers up to rounding (as trained: --no-fold)")
    return folded


def open_pictures(files: Iterable[Path], model: Any, problems: list[str] | None = None) -> Tensor:
    """Picture files as a network's input ``(N, C, H, W)``, resized, cropped and normalised as timm does.

    Args:
        files: Their paths.
        model: The network they are for.
        problems: Takes a sentence about each file that cannot be used, which is then left out; None stops at the first.

    Raises:
        ValueError: A file cannot be used, or none can, or the network takes neither grey nor colour pictures.
    """
    import torch

    from ..data.pictures import PictureError, create_picture_transform, read_picture

    channels = model.pretrained_cfg["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"expected a network for 1 or 3 channels, got one for {channels}: give arrays as --data")
    transform = create_picture_transform(model.pretrained_cfg)
    rows = []
    for file in files:
        try:
            rows.append(transform(read_picture(file, channels)))
        except PictureError as error:
            if problems is None:
                raise
            problems.append(str(error))
    if not rows:
        raise ValueError(problems[0] if problems else "expected at least one picture, got none: name a file")
    return torch.stack(rows)


def refuse_model_folder(folder: Path, remedy: str) -> None:
    """Refuse a network's folder where pictures are wanted: a run's holds some, its charts.

    Args:
        folder: What was given for pictures.
        remedy: What to do instead, for the error message.

    Raises:
        ValueError: It is the folder of a model or of a run.
    """
    if any((folder / name).is_file() for name in ("model.safetensors", "model/model.safetensors")):
        raise ValueError(f"expected pictures, got {str(folder)!r}, the folder of a network: {remedy}")


def open_images(
    data: str, model: Any, limit: int, data_dir: str | None = None, split: Literal["train", "test"] = "test"
) -> Tensor:
    """At most ``limit`` images of a data set as a network's input ``(N, C, H, W)``, evenly spread over the set.

    A picture of a folder that cannot be used is named in a warning and left out.

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
    from ..data.pictures import SUFFIXES, find_pictures

    path = Path(data)
    if data_dir and (path.is_dir() or path.suffix.lower() in SUFFIXES):
        raise ValueError(f"expected no --data-dir for pictures such as {data!r}, got {data_dir!r}: leave it out")
    if data and path.is_dir():  # Path("") is the current folder
        refuse_model_folder(path, "name a folder of pictures here")
        if not (found := find_pictures(path)):
            raise ValueError(f"expected pictures in {data!r}, got none of {', '.join(SUFFIXES)}: check the folder")
        problems = list[str]()
        images = open_pictures(map(Path, _spread(found, limit)), model, problems)
        for problem in problems:
            _logger.warning("skipped: %s", problem)
        return images
    if path.suffix.lower() in SUFFIXES:
        return open_pictures([path], model)
    return open_labelled(data, model, limit, data_dir=data_dir, split=split, label_names=None)[0]


def open_labelled(
    data: str,
    model: Any,
    limit: int,
    *,
    data_dir: str | None = None,
    split: Literal["train", "test"] = "test",
    label_names: Sequence[str] | None = (),
) -> tuple[Tensor, Tensor]:
    """At most ``limit`` images of a data set, evenly spread over the set, with their labels ``(N,)``.

    Args:
        data: What `load_arrays` takes.
        model: The network they are for.
        limit: At most so many.
        data_dir: Folder of the data set, for timm's names.
        split: Of a data set.
        label_names: Names of the network's classes, to which those of the data are matched; empty where unknown. None:
            the labels do not matter.

    Raises:
        ValueError: There is no such set, or it has other channels or classes than the network.
    """
    import torch

    from ..data import open_test_set

    test_set = open_test_set(
        data,
        model.pretrained_cfg,
        num_classes=None if label_names is None else model.num_classes,
        label_names=label_names or (),
        split=split,
        data_dir=data_dir,
        images=limit,
        batch_size=64,
    )
    images, labels = zip(*test_set.batches(0), strict=True)
    return torch.cat(images).contiguous(), torch.cat(labels)


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` of the items, from all over the list: sets are often sorted by class."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]
