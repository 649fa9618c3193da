"""``timm-gac eval``: open a network and a labelled set, evaluate, show and write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from ..runtime.terminal import new_table
from .output import check_new_file, create_console, wrote
from .sources import DataOptions, NetworkOptions, Options, TrainedModel, check_positive, fold_network

if TYPE_CHECKING:
    from torch import Tensor

    from ..analysis.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(NetworkOptions, DataOptions):
    """What `run_evaluate` does.

    Args:
        images: At most so many images, evenly spread over the set; all of them where left out.
        image_size: Side of the images in pixels; the network's own where left out.
        batch_size: Images a batch; where left out 256, on a CPU 32, which is no slower there and shows how far it is.
        num_workers: Processes that decode large images.
        precision: float32, or bfloat16 or float16 by autocast. CPUs without instructions for it (AVX512-BF16, AMX) run
            bfloat16 at less than half the speed of float32.
        firing_rates: Measure the firing rate of each layer.
        json: File to write everything to.
        answers: File (.npz) to write the labels and the class after each step to, image by image, for `timm-gac gain`.
        overwrite: Replace these files.
        fold: Fold batch norms into the convolutions, in float32: the same answers up to rounding, sooner.
    """

    images: int | None = None
    image_size: int | None = None
    batch_size: int | None = None
    num_workers: int = 4
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    firing_rates: bool = True
    json: Path | None = None
    answers: Path | None = None
    overwrite: bool = False
    fold: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "images", "image_size")
        if self.num_workers < 0:
            raise ValueError(f"expected num_workers of at least 0, got {self.num_workers}: 0 decodes in this process")
        check_new_file(self.json, self.overwrite)
        if self.answers is not None:
            if self.answers.suffix != ".npz":
                raise ValueError(f"expected a file ending in .npz for --answers, got {self.answers.name!r}: rename it")
            check_new_file(self.answers, self.overwrite, "--answers")
            if self.json is not None and self.json.resolve() == self.answers.resolve():
                raise ValueError(f"expected two files for --json and --answers, got {str(self.json)!r} twice: rename")


def evaluate(model: TrainedModel, config: Options[EvaluateConfig]) -> int:
    """Evaluate a network on a labelled set, time step by time step.

    Top-1, top-5, top-1 after each time step, calibration error and the firing rate of each layer; where the set has
    only some of the network's classes, top-1 among these too.

    Example: timm-gac eval gac_msresnet18_cifar.cifar100 --data torch/cifar100 --data-dir data

    Args:
        model: The network.
        config: What to evaluate it on, and how.
    """
    run_evaluate(model, config)
    return 0


def run_evaluate(model: str, config: EvaluateConfig, console: Console | None = None) -> Evaluation:
    """Evaluate a network with trained weights on a labelled set, show the results and write them where asked for.

    Raises:
        ValueError: There is no such network, data set or device, or they do not fit.
    """
    import numpy as np
    import torch

    from gac_kernels.backend import resolve_backend

    from ..analysis.evaluate import evaluate
    from ..data import open_test_set
    from ..data.arrays import save_arrays
    from ..hub import open_network
    from ..runtime.device import resolve_device
    from ..runtime.dtypes import AUTOCAST
    from ..runtime.files import write_json
    from ..runtime.progress import progress_of
    from ..runtime.provenance import provenance

    console = console or create_console()
    device = resolve_device(config.device)
    opened = open_network(model, config.num_steps, device=device).require_trained()
    network = opened.network
    test_set = open_test_set(
        config.data,
        network.pretrained_cfg,
        num_classes=network.num_classes,
        label_names=opened.label_names,
        split=config.split,
        data_dir=config.data_dir,
        image_size=config.image_size,
        images=config.images,
        batch_size=(32 if device.type == "cpu" else 256) if config.batch_size is None else config.batch_size,
        num_workers=config.num_workers,
        device=device,
        progress=True,
    )
    if config.fold:
        network = fold_network(network, config.precision)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(logits: Tensor, labels: Tensor) -> None:
        # The sum of the first t steps is largest where their mean is.
        kept.append((labels.cpu(), logits.double().cumsum(1).argmax(-1).cpu()))

    with progress_of("evaluating", test_set.num_images, console=console) as advance:
        result = evaluate(
            network,
            test_set.batches(0),
            amp_dtype=AUTOCAST[config.precision],
            firing_rates=config.firing_rates,
            classes=test_set.present_classes,
            progress=advance,
            each=keep if config.answers is not None else None,
        )
    if config.answers is not None:
        whole = np.min_scalar_type(network.num_classes)  # one byte up to 255 classes, so that such files can be kept
        labels, answers = (torch.cat(parts).numpy().astype(whole) for parts in zip(*kept, strict=True))
        save_arrays(config.answers, {"labels": labels, "answers": answers})
        wrote(console, config.answers)
    for table in tables(result, f"{model} on {config.data}, {config.split}, {config.precision}"):
        console.print(table)
    console.print(f"{result.images:,} images in {result.seconds:.1f} s, {result.images / result.seconds:,.0f} img/s")
    if config.json is not None:
        content = result.to_dict() | {
            "model": model,
            "weights": opened.origin,
            "data": config.data,
            "split": config.split,
            "num_steps": len(result.top1_per_step),
            "precision": config.precision,
            **({"mean_firing_rate": result.firing_rate} if result.firing_rates else {}),
            **provenance(device, resolve_backend(device)),
        }
        write_json(config.json, content)
        wrote(console, config.json)
    return result


def tables(result: Evaluation, title: str) -> list[Table]:
    """Accuracy and calibration, and the firing rate of each layer where it was measured."""
    from ..analysis.evaluate import ECE_BINS

    scores = new_table(title, [""], ["value"])
    scores.add_row("top-1", f"{result.top1:.2%}")
    if result.top1_among_present_classes is not None:
        scores.add_row(
            f"top-1 among the set's {result.present_classes} classes", f"{result.top1_among_present_classes:.2%}"
        )
    scores.add_row("top-5", f"{result.top5:.2%}")
    steps = result.top1_per_step if len(result.top1_per_step) > 1 else ()  # an ANN has no other answer
    for step, accuracy in enumerate(steps, start=1):
        scores.add_row(f"top-1 after {step} of {len(result.top1_per_step)} steps", f"{accuracy:.2%}")
    scores.add_row("cross entropy (nats)", f"{result.loss:.4f}")
    scores.add_row(f"expected calibration error ({ECE_BINS} bins)", f"{result.ece:.4f}")
    shown = [scores]
    if result.firing_rates:
        rates = new_table("spikes per neuron and time step", ["layer"], ["firing rate"])
        for layer, rate in result.firing_rates.items():
            rates.add_row(layer, f"{rate:.2%}")
        rates.add_section()
        rates.add_row("mean over layers", f"{result.firing_rate:.2%}")
        shown.append(rates)
    return shown
