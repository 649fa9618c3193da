"""Opening a network by a registered name, a folder or a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..layers.neuron import BatchNormLIF
from ..models.ann_resnet import refuse_ann
from ..models.build import registered_names
from ..runtime.device import resolve_device
from ..runtime.dtypes import float32_as
from ..runtime.finite import check_finite
from ..runtime.modes import restored_modes
from .config import CONFIG, is_ann, read_config
from .folder import load_model
from .remote import fetch_model, open_source


@dataclass
class OpenedNetwork:
    """A network and what is known of its weights.

    Attributes:
        name: As the user named it.
        network: The network, in eval mode.
        origin: Where its weights are from, in words, without a path of this machine.
        trained: Whether its weights are trained; False for random ones.
    """

    name: str
    network: Any
    origin: str
    trained: bool

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, in order; () where its files hold none. May fetch a config.json from the Hub."""
        cfg = self.network.pretrained_cfg
        names = cfg.get("label_names")
        if not names and cfg.get("file"):  # a model folder, or the weights in one
            path = Path(cfg["file"])
            folder = path if path.is_dir() else path.parent
            names = read_config(folder).get("label_names") if (folder / CONFIG).is_file() else None
        elif not names and cfg.get("hf_hub_id") and is_registered(self.name):
            names = read_config(fetch_model(cfg["hf_hub_id"])).get("label_names")
        return tuple(names or ())

    def require_trained(self) -> OpenedNetwork:
        """This network, where its weights are trained.

        Raises:
            ValueError: They are random.
        """
        if not self.trained:
            published = timm.list_models(f"{self.name}.*", pretrained=True) if is_registered(self.name) else []
            tags = f", such as {' or '.join(published)}" if published else ""
            raise ValueError(
                f"expected a network with trained weights, got {self.name!r}: name one with a tag{tags}, "
                "or a model folder"
            )
        return self

    def require_spiking(self, what: str) -> OpenedNetwork:
        """This network, where it is a spiking one.

        Args:
            what: For what, in words.

        Raises:
            ValueError: It is an ANN.
        """
        refuse_ann(self.network, what)
        return self

    def calibrate_untrained(self, batches: Iterable[Tensor]) -> None:
        """Give random weights batch-norm statistics of these images; trained ones stay as they are.

        Args:
            batches: Images ``(B, C, H, W)``, on the network's device.
        """
        if not self.trained:
            calibrate(self.network, batches)
            self.origin += ", batch-norm statistics of these images"


def open_network(
    model: str | os.PathLike[str], num_steps: int | None = None, seed: int = 0, device: torch.device | str = "cpu"
) -> OpenedNetwork:
    """Open a network.

    Args:
        model: Registered name with a tag for its published weights; without a tag for random ones, which want
            `OpenedNetwork.calibrate_untrained`; or a model folder, a run folder or ORG/NAME on the Hub.
        num_steps: Number of time steps T; the network's own where None.
        seed: Of random weights, from -2**63 to 2**64 - 1 as in `torch.manual_seed`.
        device: Where the network is to be, see `timm_gac.runtime.device.resolve_device`.

    Raises:
        ValueError: There is no such network or device, a folder's network has another T, or the seed is out of range.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"expected model as a name or a path, got {model!r}: give one such as gac_msresnet18")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"expected seed as an integer from -2**63 to 2**64 - 1, got {seed!r}: give one such as 0")
    model = os.fspath(model)
    device = resolve_device(device)
    if is_registered(model):
        opened = _open_registered(model, num_steps, seed)
    else:
        network = load_model(open_source(model))
        if num_steps is not None and network.num_steps != num_steps:
            raise ValueError(f"expected num_steps={network.num_steps} as {model} has, got {num_steps}: leave it out")
        opened = OpenedNetwork(name=model, network=network, origin=f"of {public_name(model)}", trained=True)
    opened.network.to(device)
    return opened


def is_registered(model: str) -> bool:
    """Whether a name is that of a registered network, with or without a tag."""
    return model.partition(".")[0] in registered_names()


def _open_registered(model: str, num_steps: int | None, seed: int) -> OpenedNetwork:
    tag = model.partition(".")[2]
    steps = {} if num_steps is None else {"num_steps": num_steps}
    if steps and is_ann(model.partition(".")[0]):
        raise ValueError(f"expected no num_steps for {model}, an ANN without time steps, got {num_steps}: leave it out")
    torch.manual_seed(seed)
    try:
        network: Any = timm.create_model(model, pretrained=bool(tag), **steps).eval()
    except (RuntimeError, OSError) as error:
        if str(error).startswith("expected"):
            raise ValueError(str(error)) from error
        raise ValueError(f"expected published weights of {model!r}, got none ({error}): check the tag") from error
    if tag:
        check_finite(network, f"of {model!r}")
    origin = f"published, {model}" if tag else f"random (seed {seed})"
    return OpenedNetwork(name=model, network=network, origin=origin, trained=bool(tag))


def public_name(model: str) -> str:
    """A folder by its name alone: the folders above it are not to be published with the figures."""
    path = Path(model.removeprefix("local-dir:"))
    if not path.is_dir():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


@float32_as("ieee")
@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set batch-norm statistics to those of these images: without them neurons of untrained weights rarely fire.

    Args:
        model: The network; it is left in eval mode, and after an error in the mode it had.
        batches: Images ``(B, C, H, W)``. A batch of one image has statistics too, those of its pixels.
    """
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, BatchNormLIF))]
    momenta = [norm.momentum for norm in norms]
    with restored_modes(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
            model.train()
            for images in batches:
                model(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model.eval()
