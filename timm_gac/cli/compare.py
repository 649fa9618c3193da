"""``timm-gac compare``: one network in several number formats, and how far their answers agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..runtime.terminal import new_table
from .output import check_new_file, create_console, wrote
from .sources import DataOptions, NetworkOptions, Options, TrainedModel, check_positive, open_labelled

if TYPE_CHECKING:
    from ..analysis.agreement import AgreementReport


@dataclass(frozen=True, kw_only=True)
class CompareConfig(NetworkOptions, DataOptions):
    """What `run_compare` does.

    Args:
        images: At most so many images, evenly spread over the set.
        batch_size: Images a batch.
        formats: Out of float32, float64, channels_last, bfloat16, float16, folded and int8; the others are compared
            with the first.
        json: File to write everything to.
        overwrite: Replace that file.
    """

    images: int = 1000
    batch_size: int = 50
    formats: tuple[str, ...] = ("float32", "channels_last", "folded", "bfloat16", "int8")
    json: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "images", "batch_size")
        check_new_file(self.json, self.overwrite)


def compare(model: TrainedModel, config: Options[CompareConfig]) -> int:
    """Compare a network's answers in several number formats.

    Shown are accuracy, agreement by step and by margin of the winning class, and the spikes that differ by layer.

    Example: timm-gac compare gac_msresnet18_cifar.cifar100 --data cifar100.npz --formats float32 bfloat16

    Args:
        model: The network.
        config: What to compare it on.
    """
    run_compare(model, config)
    return 0


def run_compare(model: str, config: CompareConfig, console: Console | None = None) -> AgreementReport:
    """Compare a network with trained weights in several formats, show the tables, write them where asked for.

    Raises:
        ValueError: There is no such network, data set, device or format.
    """
    from gac_kernels.backend import resolve_backend

    from ..analysis.agreement import compare_formats
    from ..hub import open_network
    from ..runtime.device import resolve_device
    from ..runtime.files import write_json
    from ..runtime.progress import progress_of
    from ..runtime.provenance import provenance

    console, device = console or create_console(), resolve_device(config.device)
    opened = open_network(model, config.num_steps, device=device).require_trained()
    opened.require_spiking("the layers in which spikes begin to differ")
    images, labels = open_labelled(
        config.data,
        opened.network,
        config.images,
        data_dir=config.data_dir,
        split=config.split,
        label_names=opened.label_names,
    )
    size = config.batch_size
    parts = zip(images.to(device).split(size), labels.to(device).split(size), strict=True)
    with progress_of("comparing", len(images) * len(config.formats), console=console) as advance:
        report = compare_formats(opened.network, parts, config.formats, advance)
    for table in tables(report, f"{model} on {config.data}, {report.images:,} images, against {report.reference}"):
        console.print(table)
    if config.json is not None:
        about = {"model": model, "weights": opened.origin, "data": config.data, "split": config.split}
        write_json(config.json, about | report.to_dict() | provenance(device, resolve_backend(device)))
        wrote(console, config.json)
    return report


def tables(report: AgreementReport, title: str) -> list[Table]:
    """Agreement by format and step, by margin, and differing spikes by layer."""
    steps = len(report.rows[0].agree_per_step)
    same_after = [f"same after {t}" for t in range(1, steps + 1)]
    scores = new_table(title, ["format"], ("top-1", *same_after, "logits differ by (rms)"), no_wrap=False)
    for row in report.rows:
        same = [f"{share:.2%}" for share in row.agree_per_step]
        scores.add_row(row.format, f"{row.top1:.2%}", *same, f"{row.logit_difference:.3f}")
    others = report.rows[1:]
    names = [row.format for row in others]
    pairs = new_table("same answer, every two formats", [""], report.pairs, no_wrap=False)
    for first, found in report.pairs.items():
        pairs.add_row(first, *(f"{share:.2%}" for share in found.values()))
    margins = new_table(
        "same answer, by margin of the winning class (logits)", ["margin from"], ("images", *names), no_wrap=False
    )
    for index, (low, count, _) in enumerate(others[0].by_margin):
        shares = [f"{row.by_margin[index][2]:.2%}" if count else "-" for row in others]
        margins.add_row(f"{low:g}", f"{count:,}", *shares)
    layers = new_table("neuron-steps whose spike differs, by layer", ["layer"], ("fires", *names), no_wrap=False)
    for layer, rate in report.firing_rates.items():
        layers.add_row(layer, f"{rate:.2%}", *(f"{row.layers[layer]:.3%}" for row in others))
    return [scores, pairs, margins, layers]
