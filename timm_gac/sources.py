"""Networks and pictures as a user names them on the command line, for the tools that look into a network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import timm
import timm.data
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from .data.arrays import load_arrays
from .data.transforms import Normalizer
from .hub import fetch_model, load_model, open_source, read_config
from .neuron import BatchNormLIF

__all__ = [
    "PICTURES",
    "calibrate",
    "label_names",
    "open_images",
    "open_labelled",
    "open_network",
    "open_pictures",
    "place_network",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_network(model: str, num_steps: int | None = None, seed: int = 0) -> tuple[Any, str]:
    """A network, and in words where its weights are from.

    Args:
        model: Registered name with a tag for its published weights; without a tag for random ones, which want
            `calibrate`; or a model folder, a run folder or ORG/NAME on the Hub.
        num_steps: Number of time steps T; the network's own where None.
        seed: Of random weights.

    Returns:
        The network in eval mode on the CPU, and the origin of its weights, ``random ...`` where they are.

    Raises:
        ValueError: There is no such network, or a folder's network has another T.
    """
    name, _, tag = model.partition(".")
    steps = {} if num_steps is None else {"num_steps": num_steps}
    if name in timm.list_models(module="spiking_resnet"):
        torch.manual_seed(seed)
        try:
            network = timm.create_model(model, pretrained=bool(tag), **steps)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"expected published weights of {model!r}, got none ({error}): check the tag") from error
        return network.eval(), f"published, {model}" if tag else f"random (seed {seed})"
    network = load_model(open_source(model))
    if num_steps is not None and network.num_steps != num_steps:
        raise ValueError(f"expected num_steps={network.num_steps} as {model} has, got {num_steps}: leave it out")
    path = Path(model.removeprefix("local-dir:"))
    if path.is_dir():  # by its name alone: the folders above it are nobody's business where figures are published
        path = path.resolve()
        model = path.parent.name if path.name == "model" else path.name
    return network, f"of {model}"


def label_names(network: Any, model: str) -> tuple[str, ...]:
    """Names of the classes of a network that `open_network` opened as ``model``; () where its files hold none."""
    cfg = network.pretrained_cfg
    names = cfg.get("label_names")
    if not names and cfg.get("file"):  # published weights in a clone of the repository
        config = Path(cfg["file"]).with_name("config.json")
        names = read_config(config.parent).get("label_names") if config.is_file() else None
    elif not names and cfg.get("hf_hub_id") and model.partition(".")[0] in timm.list_models(module="spiking_resnet"):
        names = read_config(fetch_model(cfg["hf_hub_id"])).get("label_names")
    return tuple(names or ())


def place_network(network: Any, device: str) -> Any:
    """The network on a device named by the user.

    Raises:
        ValueError: This machine has no such device.
    """
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected a device of this machine, got {device!r}: use cpu") from error


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Give batch norms the statistics of these images, so that neurons of untrained weights fire at all.

    Args:
        model: The network; it is left in eval mode.
        batches: Images ``(B, C, H, W)``, B of at least 2.
    """
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, BatchNormLIF))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def open_pictures(files: Iterable[Path], model: Any) -> Tensor:
    """Picture files as a network's input ``(N, C, H, W)``, resized, cropped and normalised as timm does.

    Raises:
        ValueError: A file is missing or no picture, or the network takes neither grey nor colour pictures.
    """
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
