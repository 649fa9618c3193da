"""``timm-gac inspect``: open a network and pictures, look inside, write the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from .output import check_new_files, check_packages, check_writable, create_console, wrote
from .sources import AnyNetworkOptions, Model, Options, SetOptions, check_positive, open_calibrated

if TYPE_CHECKING:
    from ..analysis.inspect import Inspection


@dataclass(frozen=True, kw_only=True)
class InspectConfig(AnyNetworkOptions, SetOptions):
    """What `run_inspect` does.

    Args:
        out: Folder for index.html, inspect.json and the PNGs; of learned neurons also neurons.csv.
        overwrite: Replace these files in a folder that has some.
        images: At most so many images of a folder or data set; the first is drawn, all count.
        batch_size: Images a batch.
    """

    out: Path = Path("inspect")
    overwrite: bool = False
    images: int = 64
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        if (self.out / "index.html").exists() and not self.overwrite:
            raise ValueError(f"expected a folder without a page, got {str(self.out)!r} with one: use --overwrite")
        check_writable(self.out, "--out")
        check_packages("matplotlib")


def inspect(
    model: Model,
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    config: Options[InspectConfig],
) -> int:
    """Draw spikes, gates and membranes on an HTML page.

    The page shows every layer's spikes, firing rates and dead neurons too; its pictures are written as PNGs beside it.
    Of a network that learned decays and thresholds (--neuron plif or plif_channel in training) it draws what they are
    by layer, beside where they began: neurons.png, with all numbers in neurons.csv.

    Example: timm-gac inspect gac_msresnet18_cifar.cifar100 examples/pictures/apple.png --out inspect

    Args:
        model: The network.
        image: A picture, a folder of pictures, an .npz file, digits, or a data set's name in timm.
        config: What to draw it on.
    """
    run_inspect(model, image, config)
    return 0


def run_inspect(model: str, image: str, config: InspectConfig, console: Console | None = None) -> Inspection:
    """Look into a network on one or more pictures and write what is seen.

    Random weights get the batch-norm statistics of the same images, as their neurons would not fire otherwise; the
    page says so.

    Raises:
        ValueError: There is no such network, image or device; or a file of the page is there and not to be replaced.
    """
    from ..analysis.inspect import inspect_network, write_inspection
    from ..analysis.inspect.page import NAMES

    check_new_files(config.out, NAMES, config.overwrite)
    opened, batches = open_calibrated(model, image, config, "a page of spikes and membranes")
    inspection = inspect_network(opened.network, batches, opened.origin, opened.label_names)
    console = console or create_console()
    for file in write_inspection(inspection, config.out):
        wrote(console, file)
    return inspection
