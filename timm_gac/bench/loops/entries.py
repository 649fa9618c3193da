"""One entry of the benchmark of loops: its network, its loop, its row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...runtime.graphed import graphed
from ...runtime.provenance import version_of
from ..harness import Row
from ..networks import Unavailable, describe
from ..session import Session
from ..steps import free_memory, precision_settings
from .clock import Clock, ResidentBatches, reset_memory
from .libraries import accelerate_loop, lightning_loop, trainer_loop
from .ours import COMPILING, Settings, choose_algorithms, graphed_step, plain_loop, short_epochs

RESIDENT = 4  # batches of the data set on the device
Loop = Callable[[nn.Module, DataLoader[Any], Settings], None]
# Name of a loop to the function, its optimiser, and keys of its batches where these are dictionaries.
LOOPS: dict[str, tuple[Loop, str, tuple[str, ...]]] = {
    "step": (graphed_step, "SGD, fused", ()),
    "plain": (plain_loop, "SGD, fused", ()),
    "accelerate": (accelerate_loop, "AdamW of timm", ()),
    "trainer": (trainer_loop, "AdamW of the Trainer", ("images", "labels")),
    "lightning": (lightning_loop, "AdamW", ()),
}
# Packages whose versions a row has, by loop and by network.
PACKAGES = {
    "accelerate": ("accelerate", "timm"),
    "timm": ("timm",),
    "trainer": ("transformers", "accelerate"),
    "lightning": ("pytorch-lightning",),
    "loader": ("timm",),
    "ann": ("timm",),
    "spikingjelly": ("spikingjelly",),
    "spikingjelly_memopt": ("spikingjelly",),
}


def split_entry(entry: str) -> tuple[str, str, str]:
    """Loop, network and way of an entry; the way may be empty."""
    loop, _, rest = entry.partition("/")
    network, _, way = rest.partition("+")
    return loop, network, way


def versions_of(entry: str) -> str:
    """Versions of the packages that an entry uses besides this one and PyTorch."""
    loop, network, _ = split_entry(entry)
    packages = dict.fromkeys((*PACKAGES.get(loop, ()), *PACKAGES.get(network, ())))
    return ", ".join(f"{name} {version_of(name)}" for name in packages if version_of(name))


def resident_set(session: Session) -> tuple[Tensor, Tensor]:
    """Images ``(N * B, C, H, W)``, channels-last, and labels on the device."""
    images = torch.cat([session.images.roll(index, 0) for index in range(RESIDENT)])
    images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(session.model.num_classes, (len(images),), device=images.device)


def measure_entry(session: Session, entry: str, seconds: float, epochs: int, row: Row) -> None:
    """Check an entry's network, run its loop, and add what is found to the row as it comes."""
    loop, name, way = split_entry(entry)
    run, optimizer, names = LOOPS[loop]
    if failure := session.check(name):
        row |= {"status": "failed check", "note": failure}
        return
    case, device = session.case, session.device
    left = free_memory(device) - session.images.nbytes / 2**30
    settings = Settings(device, case.precision, case.batch)
    images, labels = resident_set(session)
    with ExitStack() as stack:
        stack.enter_context(precision_settings(case.precision))
        network = session.build(name)
        choose_algorithms(network, images[: case.batch], labels[: case.batch], settings)
        reset_memory(device)
        notes = stack.enter_context(reasons_for_eager())
        trained, row["optimizer"] = network, optimizer
        if way == "graphed":
            trained = graphed_network(network, device)
        elif way:
            trained = torch.compile(network, **COMPILING[way])  # type: ignore[assignment]
            if loop == "plain":
                stack.enter_context(empty_cache())
                short_epochs(trained, images[: case.batch], labels[: case.batch], settings, epochs, row)
        with training_is_checked(network):
            clock = Clock(device, seconds)
            run(trained, ResidentBatches(images, labels, case.batch, names).loader(clock), settings)
        said = describe(name, compiled=way in COMPILING)
        row |= clock.row(case.batch) | {"status": "ok", "note": "; ".join([said] * bool(said) + notes)}
    if device.type == "cuda" and left > 0.05:
        row["note"] += f" {left:.2f} GiB were held before"


def graphed_network(network: nn.Module, device: torch.device) -> nn.Module:
    """`timm_gac.graphed` of a network."""
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    return graphed(network.train())


@contextmanager
def training_is_checked(network: nn.Module) -> Iterator[None]:
    """Raise unless the block has moved the network's weights, and all stayed finite."""
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    yield
    # Lightning leaves the network on the CPU.
    pairs = [(before[name], parameter.to(before[name].device)) for name, parameter in network.named_parameters()]
    moved = [old for old, new in pairs if not torch.equal(old, new)]
    if len(moved) < len(before) / 2:
        raise ValueError(f"expected the loop to train the network, got {len(moved)} of {len(before)} weights moved")
    if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise ValueError("expected finite weights after the loop, got some that are not: its time would mean nothing")


@contextmanager
def empty_cache() -> Iterator[None]:
    """Compile as if for the first time: without what Inductor keeps on the disk."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


@contextmanager
def reasons_for_eager() -> Iterator[list[str]]:
    """What `timm_gac.graphed` logs within the block where it does not replay graphs."""
    found: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "eagerly" in record.getMessage():
                found.append(record.getMessage())

    logger, keeper = logging.getLogger("timm_gac.runtime.graphed"), Keeper(logging.INFO)
    level = logger.level
    logger.addHandler(keeper)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.setLevel(level)
        logger.removeHandler(keeper)
