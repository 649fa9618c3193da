"""``timm-gac energy``: open a network and images, measure, show and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .output import check_figures, create_console, wrote
from .sources import AnyNetworkOptions, DataOptions, Model, Options, check_costs, check_positive, open_calibrated

if TYPE_CHECKING:
    from torch import Tensor

    from ..energy import EnergyReport

FILES = ("energy.json", "energy.csv", "energy.png")


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(AnyNetworkOptions, DataOptions):
    """What `run_energy` does.

    Args:
        data: A picture, a folder of pictures, an .npz file, digits, or a data set's name in timm.
        images: At most so many images, evenly spread over the set.
        batch_size: Images a batch.
        costs: Cost table: 45nm-float32, 45nm-float16, 45nm-int8 or 45nm-int8-acc32.
        out: Folder to write energy.json, energy.csv and energy.png to.
        overwrite: Replace these files.
    """

    data: str
    images: int = 256
    batch_size: int = 32
    costs: str = "45nm-float32"
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_costs(self.costs)
        check_positive(self, "batch_size")
        check_figures(self.out, FILES, self.overwrite)


def energy(model: Model, config: Options[EnergyConfig]) -> int:
    """Count each layer's operations on images, and their energy.

    Energies are given under three conventions, beside the energy of the ANN of the same shape.

    Example: timm-gac energy gac_msresnet18_cifar.cifar100 --data cifar100.npz --out energy

    Args:
        model: The network.
        config: What to measure it on.
    """
    run_energy(model, config)
    return 0


def run_energy(model: str, config: EnergyConfig, console: Console | None = None) -> EnergyReport:
    """Measure a network on images, show the tables and write the files that were asked for.

    Random weights get the batch-norm statistics of the same images, as their neurons would not fire otherwise; the
    report says so.

    Raises:
        ValueError: There is no such network, image, device or cost table.
    """
    from ..energy import measure_energy
    from ..energy.output import layer_table, totals_table, write_chart, write_csv, write_json
    from ..runtime.progress import progress_of

    opened, batches = open_calibrated(model, config.data, config, "an estimate of energy")
    with progress_of("measuring", sum(map(len, batches))) as advance:
        report = measure_energy(
            opened.network,
            _counted(batches, advance),
            costs=config.costs,
            weights=opened.origin,
            trained=opened.trained,
        )
    console = console or create_console()
    console.print(layer_table(report))
    console.print(totals_table(report))
    console.print(
        "Batch norm is taken as folded; neurons, additions and memory traffic are not counted. "
        "Estimated from counted operations, not measured on a chip.",
        highlight=False,
    )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        for name, write in zip(FILES, (write_json, write_csv, write_chart), strict=True):
            write(report, config.out / name)
            wrote(console, config.out / name)
    return report


def _counted(batches: Iterable[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        advance(len(batch))
