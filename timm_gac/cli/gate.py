"""``timm-gac gate``: what the gate of a network with gated attention coding does, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..runtime.terminal import new_table
from .output import check_new_file, create_console, wrote
from .sources import AnyNetworkOptions, DataOptions, Model, Options, check_positive, open_labelled

if TYPE_CHECKING:
    from ..analysis.gate import GateStatistics, Replaced


@dataclass(frozen=True, kw_only=True)
class GateConfig(AnyNetworkOptions, DataOptions):
    """What `run_gate` does.

    Args:
        images: At most so many images, evenly spread over the set.
        batch_size: Images a batch.
        replace: Put other gates in the place of the trained one, and evaluate; without it labels do not matter.
        calibration_images: So many training images to fit the batch norms to each other gate; 0 leaves them.
        json: File to write everything to.
        overwrite: Replace that file.
    """

    images: int = 1000
    batch_size: int = 50
    replace: bool = True
    calibration_images: int = 0
    json: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "images", "batch_size")
        if self.calibration_images < 0:
            raise ValueError(f"expected calibration_images of at least 0, got {self.calibration_images}: raise it")
        if self.calibration_images and not self.replace:
            raise ValueError("expected --replace for --calibration-images, got --no-replace: leave one of them out")
        check_new_file(self.json, self.overwrite)


def gate(model: Model, config: Options[GateConfig]) -> int:
    """Measure what a gate does and what it is worth.

    Shown are its scale, what it varies over, its gradients, and accuracy with other gates in its place.

    Example: timm-gac gate gac_msresnet18_cifar.cifar100 --data cifar100.npz

    Args:
        model: The network.
        config: What to measure it on.
    """
    run_gate(model, config)
    return 0


def run_gate(model: str, config: GateConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure a network's gate on labelled images, show the tables, write them where asked for.

    Returns:
        What the file says.

    Raises:
        ValueError: There is no such network, data set or device, or the network has no gate.
    """
    import dataclasses

    from gac_kernels.backend import resolve_backend

    from ..analysis.gate import gate_statistics, replaced_gates, try_gates, weight_and_gradient
    from ..hub import open_network
    from ..hub.open import calibrate
    from ..runtime.device import resolve_device
    from ..runtime.files import write_json
    from ..runtime.progress import progress_of
    from ..runtime.provenance import provenance

    console, device = console or create_console(), resolve_device(config.device)
    opened = open_network(model, config.num_steps, config.seed, device).require_spiking("what a gate does")
    names = (opened.label_names if opened.trained else ()) if config.replace else None
    source: dict[str, Any] = {"data_dir": config.data_dir, "label_names": names}
    images, labels = open_labelled(config.data, opened.network, config.images, split=config.split, **source)
    images, labels = images.to(device), labels.to(device)
    batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
    opened.calibrate_untrained(part for part, _ in batches[:10])
    statistics = gate_statistics(opened.network, (part for part, _ in batches))
    gradients = weight_and_gradient(opened.network, *batches[0]) if names is not None else {}
    replaced: list[Replaced] = []
    if config.replace and opened.trained:
        fit = None
        if config.calibration_images:
            own = open_labelled(config.data, opened.network, config.calibration_images, split="train", **source)[0]
            parts = own.to(device).split(config.batch_size)
            fit = lambda network: calibrate(network, parts)  # noqa: E731
        with progress_of("evaluating", len(images) * len(replaced_gates(0.5)), console=console) as advance:
            replaced = try_gates(opened.network, batches, statistics.mean, fit, advance)
    for table in tables(model, statistics, gradients, replaced):
        console.print(table)
    content = {
        "model": model,
        "weights": opened.origin,
        "data": config.data,
        "split": config.split,
        "calibration_images": config.calibration_images,
        "gate": statistics.to_dict(),
        "weight_and_gradient": {name: list(values) for name, values in gradients.items()},
        "replaced": [dataclasses.asdict(row) for row in replaced],
        **provenance(device, resolve_backend(device)),
    }
    if config.json is not None:
        write_json(config.json, content)
        wrote(console, config.json)
    return content


def tables(
    model: str,
    statistics: GateStatistics,
    gradients: dict[str, tuple[float, float]],
    replaced: list[Replaced],
) -> list[Table]:
    """The gate, its gradients where measured, and accuracy with other gates where measured."""
    scale = new_table(f"gate of {model}, {statistics.images:,} images", [""], ["value"], no_wrap=False)
    scale.add_row("mean", f"{statistics.mean:.4f}")
    scale.add_row("standard deviation", f"{statistics.std:.4f}")
    for share, value in statistics.quantiles.items():
        scale.add_row(f"{share:.1%} of it below", f"{value:.4f}")
    for name, share in statistics.shares.items():
        of_several = " of these, such as a pixel of one channel" if name == "interactions" else ""
        scale.add_row(f"variance over {name}{of_several}", f"{share:.1%}")
    scale.add_row("variance between images, at one step, pixel and channel", f"{statistics.between_images:.1%}")
    scale.add_row("shut, below 0.01", f"{statistics.shut:.2%}")
    scale.add_row("open, above 0.99", f"{statistics.open:.2%}")
    scale.add_row("temporal score by step", ", ".join(f"{value:.3f}" for value in statistics.temporal))
    scale.add_row("largest temporal score, without its sign", f"{statistics.largest_temporal:.3f}")
    scale.add_row("spatial score, standard deviation", f"{statistics.spatial_std:.3f}")
    if statistics.firing_level is not None:
        scale.add_row("level above which `lif` can fire", f"{statistics.firing_level:.4f}")
        scale.add_row("share of the gate above it", f"{statistics.above_level:.2%}")
    shown = [scale]
    if gradients:
        numbers = ("weight", "gradient", "gradient / weight")
        rows = new_table("one batch in training mode, root mean squares", ["part"], numbers, no_wrap=False)
        for name, (weight, gradient) in gradients.items():
            rows.add_row(name, f"{weight:.2e}", f"{gradient:.2e}", f"{gradient / weight:.2e}")
        shown.append(rows)
    if replaced:
        numbers = ("top-1", "same answer", "lif fires")
        rows = new_table("other gates in its place", ["gate"], numbers, no_wrap=False)
        for row in replaced:
            rows.add_row(row.gate, f"{row.top1:.2%}", f"{row.agree:.2%}", f"{row.lif:.2%}")
        shown.append(rows)
    return shown
