"""``timm-gac anytime``: accuracy against energy at every step, early exit, and what the encoder's output says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from ..runtime.terminal import new_table
from .output import check_figures, create_console, wrote
from .sources import AnyNetworkOptions, DataOptions, Model, Options, check_costs, check_positive, open_labelled

if TYPE_CHECKING:
    from ..analysis.anytime import AnytimeReport
    from ..analysis.coding import CodingReport
    from ..hub import OpenedNetwork

FILES = ("anytime.json", "anytime.png", "coding.png")
# With fewer images than this the estimate of an entropy is mostly bias, so tables and picture leave it out.
CODING_IMAGES = 32
BITS = (
    "Bits: entropy of the encoder's output of the first t steps, and what step t adds; binned plug-in estimates, so "
    "compare their growth over time."
)


@dataclass(frozen=True, kw_only=True)
class AnytimeConfig(AnyNetworkOptions, DataOptions):
    """What `run_anytime` does.

    Args:
        against: A second network to show beside, such as the direct-coding twin.
        images: At most so many images, evenly spread over the set.
        coding_images: Of these, for the entropies of the encoder's output.
        batch_size: Images a batch.
        confidences: Confidences to stop at.
        costs: Cost table: 45nm-float32, 45nm-float16, 45nm-int8 or 45nm-int8-acc32.
        convention: Convention of the picture: paper, strict or neurobench, see docs/energy.md.
        precision: float32, or bfloat16 by autocast.
        out: Folder to write anytime.json, anytime.png and, with 32 images or more, coding.png to.
        overwrite: Replace these files.
    """

    against: str | None = None
    images: int = 2000
    coding_images: int = 256
    batch_size: int = 32
    confidences: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    costs: str = "45nm-float32"
    convention: Literal["paper", "strict", "neurobench"] = "strict"
    precision: Literal["float32", "bfloat16"] = "float32"
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_costs(self.costs)
        check_positive(self, "images", "coding_images", "batch_size")
        bad = [value for value in self.confidences if not 0.0 < value <= 1.0]
        if bad or not self.confidences:
            got = bad[0] if bad else "none"
            raise ValueError(f"expected confidences above 0 and at most 1, got {got}: give such as 0.9")
        check_figures(self.out, FILES, self.overwrite)


def anytime(model: Model, config: Options[AnytimeConfig]) -> int:
    """Measure accuracy and energy after each step, and early exit.

    Early exit is by confidence; also measured is how much information the encoder's output carries.

    Example: timm-gac anytime gac_msresnet18_cifar.cifar100 --against msresnet18_cifar.cifar100 --data cifar100.npz

    Args:
        model: The network.
        config: What to measure it on.
    """
    run_anytime(model, config)
    return 0


def run_anytime(
    model: str, config: AnytimeConfig, console: Console | None = None
) -> list[tuple[AnytimeReport, CodingReport]]:
    """Measure one or two networks on the same labelled images, show the tables, write the files asked for.

    Raises:
        ValueError: There is no such network, data set, device or cost table.
    """
    from ..analysis.anytime import write_anytime_chart
    from ..analysis.coding import write_coding_chart
    from ..runtime.files import write_json

    names = [model] if config.against is None else [model, config.against]
    console = console or create_console()
    results, enough = [], True
    networks = [_open(name, config) for name in names]  # a wrong name is refused before the first is measured
    for opened in networks:
        anytime, coding = _measure(opened, config)
        results.append((anytime, coding))
        enough = enough and coding.images >= CODING_IMAGES
        console.print(_step_table(anytime, coding if enough else None))
        console.print(_exit_table(anytime))
    console.print(
        "Row t is the answer after t steps. Energies are estimated from counted operations; an early exit is charged "
        "the mean energy of an answer after as many steps. "
        + (BITS if enough else f"Entropies need {CODING_IMAGES} images or more and are left out."),
        highlight=False,
    )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        content = [anytime.to_dict() | {"coding": coding.to_dict()} for anytime, coding in results]
        write_json(config.out / FILES[0], content)
        write_anytime_chart([anytime for anytime, _ in results], config.out / FILES[1], config.convention)
        if enough:
            write_coding_chart([coding for _, coding in results], config.out / FILES[2])
        for file in FILES if enough else FILES[:2]:
            wrote(console, config.out / file)
    return results


def _open(model: str, config: AnytimeConfig) -> OpenedNetwork:
    from ..hub import open_network
    from ..runtime.device import resolve_device

    device = resolve_device(config.device)
    opened = open_network(model, config.num_steps, config.seed, device).require_spiking("answers at every time step")
    try:
        opened.network.spec.refuse_spikes("an estimate of energy", "levels")
    except ValueError as error:  # this command has no answer without one
        raise ValueError(f"{error}; timm-gac eval has the accuracy after each step") from error
    return opened


def _measure(opened: OpenedNetwork, config: AnytimeConfig) -> tuple[AnytimeReport, CodingReport]:
    from ..analysis.anytime import measure_anytime
    from ..analysis.coding import measure_coding
    from ..runtime.device import resolve_device
    from ..runtime.dtypes import AUTOCAST
    from ..runtime.progress import progress_of

    device = resolve_device(config.device)
    images, labels = open_labelled(
        config.data,
        opened.network,
        config.images,
        data_dir=config.data_dir,
        split=config.split,
        label_names=opened.label_names if opened.trained else None,
    )

    def batches(limit: int | None = None, advance: Callable[[int], None] | None = None) -> Any:
        size = config.batch_size
        for part, classes in zip(images[:limit].split(size), labels[:limit].split(size), strict=True):
            yield part.to(device), classes.to(device)
            if advance is not None:
                advance(len(part))

    opened.calibrate_untrained(part for part, _ in batches(256))
    with progress_of("measuring", len(images)) as advance:
        anytime = measure_anytime(
            opened.network,
            batches(advance=advance),
            confidences=config.confidences,
            costs=config.costs,
            weights=opened.origin,
            amp_dtype=AUTOCAST[config.precision],
            trained=opened.trained,
        )
    return anytime, measure_coding(opened.network, (part for part, _ in batches(config.coding_images)))


def _step_table(report: AnytimeReport, coding: CodingReport | None) -> Table:
    energy = report.energy
    title = f"{energy.model}, T={energy.num_steps}, weights {energy.weights or 'as given'}, {energy.images:,} images"
    bits = ["bits\nso far", "new\nbits"] if coding else []
    table = new_table(title, numbers=("step", "top-1", "confidence", *_energy_headings(report), *bits))
    for step in range(energy.num_steps):
        energies = [f"{values[step]:.4g}" for values in report.energy_mj.values()]
        bits = [f"{coding.encoder.joint[step]:.2f}", f"{coding.encoder.new[step]:.2f}"] if coding else []
        table.add_row(str(step + 1), f"{report.top1[step]:.2%}", f"{report.confidence[step]:.1%}", *energies, *bits)
    return table


def _energy_headings(report: AnytimeReport) -> list[str]:
    return [f"{name}\nmJ" for name in report.energy_mj]


def _exit_table(report: AnytimeReport) -> Table:
    table = new_table("early exit", numbers=("confidence", "top-1", "mean steps", *_energy_headings(report)))
    for point in report.exits:
        energies = [f"{value:.4g}" for value in point.energy_mj.values()]
        table.add_row(f"{point.confidence:g}", f"{point.top1:.2%}", f"{point.mean_steps:.2f}", *energies)
    return table
