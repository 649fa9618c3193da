"""``timm-gac inspect``: open a network and pictures, look inside, write the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..device import resolve_device
from ..hub import open_network
from ..sources import open_images
from .page import write_inspection
from .record import Inspection, inspect_network

__all__ = ["InspectConfig", "run_inspect"]


@dataclass(frozen=True)
class InspectConfig:
    """What `run_inspect` does.

    Args:
        out: Folder for index.html, inspect.json and the PNGs.
        overwrite: Write to a folder that has an index.html.
        images: At most so many images of a folder or data set; the first is drawn, all count.
        batch_size: Images a batch.
        data_dir: Folder of the data set, for timm's names.
        split: Split of the data set.
        num_steps: Number of time steps T; the network's own where left out.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
        seed: Seed of random weights, used for a registered name without a tag.
    """

    out: Path = Path("inspect")
    overwrite: bool = False
    images: int = 64
    batch_size: int = 8
    data_dir: str | None = None
    split: Literal["train", "test"] = "test"
    num_steps: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {self.batch_size}: raise it")
        if (self.out / "index.html").exists() and not self.overwrite:
            raise ValueError(f"expected a folder without a page, got {str(self.out)!r} with one: use --overwrite")
        if self.out.is_file():
            raise ValueError(f"expected a folder, got the file {str(self.out)!r}: choose another --out")


def run_inspect(model: str, image: str, config: InspectConfig, console: Console | None = None) -> Inspection:
    """Look into a network on one or more pictures and write what is seen.

    Random weights get the batch-norm statistics of the same images, as their neurons would not fire otherwise; the
    page says so.

    Raises:
        ValueError: There is no such network, image or device.
    """
    device = resolve_device(config.device)
    opened = open_network(model, config.num_steps, config.seed, device)
    images = open_images(image, opened.network, config.images, config.data_dir, config.split)
    batches = [batch.to(device) for batch in images.split(config.batch_size)]
    opened.calibrate_untrained(batches)
    inspection = inspect_network(opened.network, batches, opened.origin, opened.label_names)
    console = console or Console()
    for file in write_inspection(inspection, config.out):
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    return inspection
