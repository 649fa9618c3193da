"""``timm-gac energy``: open a network and images, measure, show and write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..device import resolve_device
from ..hub import open_network
from ..sources import open_images
from .meter import measure_energy
from .output import layer_table, totals_table, write_chart, write_csv, write_json
from .report import EnergyReport
from .tables import COSTS

__all__ = ["EnergyConfig", "run_energy"]

FILES = {"energy.json": write_json, "energy.csv": write_csv, "energy.png": write_chart}


@dataclass(frozen=True)
class EnergyConfig:
    """What `run_energy` does.

    Args:
        data: A picture, a folder of pictures, an .npz file, ``digits``, or a data set's name in timm.
        data_dir: Folder of the data set, for timm's names.
        split: Split of the data set.
        images: Number of images, evenly spread over the set.
        batch_size: Images a batch.
        num_steps: Number of time steps T; the network's own where left out.
        costs: Cost table: 45nm-float32, 45nm-float16, 45nm-int8 or 45nm-int8-acc32.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
        seed: Seed of random weights, used for a registered name without a tag.
        out: Folder to write energy.json, energy.csv and energy.png to.
        overwrite: Replace these files.
    """

    data: str
    data_dir: str | None = None
    split: Literal["train", "test"] = "test"
    images: int = 256
    batch_size: int = 32
    num_steps: int | None = None
    costs: str = "45nm-float32"
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.costs not in COSTS:
            raise ValueError(f"expected costs as one of {list(COSTS)}, got {self.costs!r}: choose one of these")
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {self.batch_size}: raise it")
        existing = [str(self.out / name) for name in FILES if self.out is not None and (self.out / name).exists()]
        if existing and not self.overwrite:
            raise ValueError(f"expected a folder without {existing[0]}, got one with it: use --overwrite")


def run_energy(model: str, config: EnergyConfig, console: Console | None = None) -> EnergyReport:
    """Measure a network on images, show the tables and write the files that were asked for.

    Random weights get the batch-norm statistics of the same images, as their neurons would not fire otherwise; the
    report says so.

    Raises:
        ValueError: There is no such network, image, device or cost table.
    """
    device = resolve_device(config.device)
    opened = open_network(model, config.num_steps, config.seed, device)
    images = open_images(config.data, opened.network, config.images, config.data_dir, config.split)
    batches = [batch.to(device) for batch in images.split(config.batch_size)]
    opened.calibrate_untrained(batches)
    report = measure_energy(opened.network, batches, config.costs, opened.origin, opened.trained)
    console = console or Console()
    console.width = console.width if console.is_terminal else 160
    console.print(layer_table(report))
    console.print(totals_table(report))
    console.print(
        "Batch norm is taken as folded; neurons, additions and memory traffic are not counted. "
        "Estimated from counted operations, not measured on a chip.",
        highlight=False,
    )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        for name, write in FILES.items():
            write(report, config.out / name)
            console.print(f"wrote {config.out / name}", highlight=False, soft_wrap=True)
    return report
