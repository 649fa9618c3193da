"""The command line ``timm-gac``: each subcommand is one function, whose imports wait until it is called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from .anytime_command import AnytimeConfig
from .bench_model import ModelBenchConfig
from .benchmark import KernelBenchConfig
from .data.command import DataConfig
from .demo import DemoConfig
from .energy.command import EnergyConfig
from .evaluate_command import EvaluateConfig
from .hub.prepare import PublishConfig
from .inspect.command import InspectConfig
from .predict import PredictConfig

# What brings an optional package; anything else is in `all`.
EXTRAS = {"accelerate": "train", "tensorboard": "train", "matplotlib": "bench", "sklearn": "demo"}
DESCRIPTION = "Gated attention coding and spiking ResNets for timm: demonstrate, convert, benchmark and list."


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> int:
    """Train a small network on real handwritten digits (about a minute), save it, reload it, draw its spikes."""
    from .demo import run_demo

    return run_demo(config)


def convert(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    out_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_FOLDER")],
    model: str | None = None,
    num_classes: int | None = None,
    num_steps: int | None = None,
    overwrite: bool = False,
) -> int:
    """Turn a checkpoint of the published code into a model folder (config.json, model.safetensors).

    Args:
        file: The checkpoint (.pth); read without running any code that it may hold.
        out_folder: Folder to write.
        model: Name of the model; found out from the file where left out.
        num_classes: Number of classes; found out from the file where left out.
        num_steps: Number of time steps T; found out from the file where left out, 4 for direct coding.
        overwrite: Replace the model in a folder that has one.
    """
    from rich import print as show

    from .hub import convert_checkpoint

    folder = convert_checkpoint(file, out_folder, model, num_classes, num_steps, overwrite)
    show(f"wrote {folder}: load it with timm.create_model('local-dir:{folder}', pretrained=True)")
    return 0


def quantize(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    out_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_FOLDER")],
    clip: Literal["max", "mse"] = "mse",
    overwrite: bool = False,
) -> int:
    """Round a network's weights to 8 bits, for integer inference, and save it as a model folder.

    Args:
        model: Model folder, ORG/NAME on the Hub, or a registered name with a tag for its published weights.
        out_folder: Folder to write.
        clip: Scale a channel by its largest weight, or by the least squared error.
        overwrite: Replace the model in a folder that has one.
    """
    from rich import print as show

    from .hub import save_quantized
    from .sources import open_network

    network, origin = open_network(model)
    folder = save_quantized(network, out_folder, clip, overwrite)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    show(f"wrote {folder} ({size:.1f} MiB; weights {origin}): load it with timm_gac.hub.load_model('{folder}')")
    return 0


def push(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")],
    config: Annotated[PublishConfig, tyro.conf.arg(name="")],
) -> int:
    """Publish a run or a model folder on the Hugging Face Hub (token: HF_TOKEN or `hf auth login`).

    Args:
        source: Run folder of the trainer, or a folder with config.json and model.safetensors.
        config: What to publish, and where.
    """
    from rich.console import Console

    from .hub import push as publish

    result = publish(source, config)
    console = Console(highlight=False, soft_wrap=True)
    for name, size in result.files.items():
        mark = "sent" if name in result.sent else "    " if config.dry_run else "same"
        console.print(f"{mark}  {size:>12,}  {name}")
    if "energy.json" not in result.files:
        console.print(f"the card has no energy: `timm-gac energy {source} --data DATA --out {source}` measures it")
    if config.dry_run:
        console.print(f"nothing was sent: look at {result.folder}, then push without --dry-run")
    else:
        console.print(f"published: {result.url}\nload it with timm.create_model('hf-hub:{config.repo_id}')")
    return 0


def verify(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO_OR_FOLDER")], revision: str | None = None
) -> int:
    """Rebuild a model of the Hub or of a folder and compare its logits with the golden ones kept with it.

    Args:
        source: ORG/NAME on the Hub, or a folder.
        revision: Branch, tag or commit of the repository.
    """
    from rich.console import Console

    from .hub import open_source
    from .hub import verify as check

    result = check(open_source(source, revision))
    Console(highlight=False, soft_wrap=True).print(
        f"weights         {'those' if result.same_weights else 'NOT those'} that the golden output was made with\n"
        f"float64 logits  largest difference {result.difference:.1e} over {result.images} images\n"
        f"float32 classes {'equal' if result.same_classes else 'different'}\n"
        f"{'verified' if result.passed else 'FAILED'}: {source}"
    )
    return 0 if result.passed else 1


def energy(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    config: Annotated[EnergyConfig, tyro.conf.arg(name="")],
) -> int:
    """Count what each layer really computes on images, and its energy under three conventions beside the ANN's.

    Args:
        model: Model folder, ORG/NAME on the Hub, or a registered name: with a tag for published weights, without for
            random ones, whose batch norms take the statistics of the images.
        config: What to measure it on.
    """
    from .energy.command import run_energy

    run_energy(model, config)
    return 0


def inspect(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    config: Annotated[InspectConfig, tyro.conf.arg(name="")],
) -> int:
    """Draw what happens inside on a picture: spikes, rates, gates, membranes, dead neurons; one HTML page and PNGs.

    Args:
        model: Model folder, ORG/NAME on the Hub, or a registered name: with a tag for published weights, without for
            random ones, whose batch norms take the statistics of the images.
        image: A picture, a folder of pictures, an .npz file, ``digits``, or a data set's name in timm.
        config: What to draw it on.
    """
    from .inspect.command import run_inspect

    run_inspect(model, image, config)
    return 0


def anytime(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    config: Annotated[AnytimeConfig, tyro.conf.arg(name="")],
) -> int:
    """Measure accuracy and energy after each time step, early exit by confidence, and the encoder's information.

    Args:
        model: Model folder, ORG/NAME on the Hub, or a registered name, as for `energy`.
        config: What to measure it on.
    """
    from .anytime_command import run_anytime

    run_anytime(model, config)
    return 0


def evaluate(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
) -> int:
    """Evaluate a network on a labelled set: top-1, top-5, after each time step, calibration, firing rate by layer.

    Args:
        model: Registered name.tag, model or run folder, or ORG/NAME on the Hub.
        config: What to evaluate it on, and how.
    """
    from .evaluate_command import run_evaluate

    run_evaluate(model, config)
    return 0


def predict(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    config: Annotated[PredictConfig, tyro.conf.arg(name="")],
) -> int:
    """Show the classes that a network sees in pictures, and how sure it is.

    Args:
        images: Picture files, and folders of them.
        config: With which network, and what to show.
    """
    from .predict import run_predict

    return run_predict(images, config)


def bench_kernels(config: Annotated[KernelBenchConfig, tyro.conf.arg(name="")]) -> int:
    """Time each kernel against its rivals and the copy bandwidth of the same run, once it has passed its check."""
    from rich.console import Console

    from . import benchmark

    rows = benchmark.bench_kernels(config)
    console = Console()
    # Off a terminal rich assumes 80 columns and would fold every cell of a log.
    console.width = console.width if console.is_terminal else 220
    console.print(benchmark.kernel_table(rows))
    return benchmark.exit_code(rows)


def bench_model(config: Annotated[ModelBenchConfig, tyro.conf.arg(name="")]) -> int:
    """Time a whole network, in training and inference, against its rivals, timm's ANN and its convolutions alone."""
    from . import bench_model

    return bench_model.show_results(*bench_model.bench_model(config))


def models(pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*") -> int:
    """List the registered models with their encoder, neuron dialect, parameters, time steps T and input.

    Args:
        pattern: Show only names that match, such as 'gac_*'.
    """
    import timm
    import torch
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from . import CIFAR, IMAGENET, GatedAttentionCoding

    names = timm.list_models(pattern, module="spiking_resnet")
    if not names:
        raise ValueError(f"expected a pattern that matches a model, got {pattern!r}: try '*resnet*'")
    table = Table(title=f"{len(names)} models", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("model", "encoder", "dialect"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "T", "classes", "input"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        network = timm.create_model(name, device=torch.device("meta"))
        table.add_row(
            name,
            "GAC" if isinstance(network.encoder, GatedAttentionCoding) else "direct",
            {CIFAR: "CIFAR", IMAGENET: "ImageNet"}[network.spec],
            f"{sum(parameter.numel() for parameter in network.parameters()):,}",
            str(network.num_steps),
            str(network.num_classes),
            "x".join(map(str, network.pretrained_cfg["input_size"])),
        )
    Console().print(table)
    return 0


def data(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER... OUT")],
    config: Annotated[DataConfig, tyro.conf.arg(name="")],
) -> int:
    """Make the .npz that `train` reads out of folders of images, or of CIFAR as torchvision keeps it.

    Args:
        name: cifar10 or cifar100; any other name stands for the folders of images that follow.
        paths: One folder or more (train/CLASS/IMAGE and val/CLASS/IMAGE, or Tiny-ImageNet-200), and the file to write.
        config: How.
    """
    from .data.command import run_data

    run_data(name, paths, config)
    return 0


def train(recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]) -> int:
    """Train a network by a recipe, any of whose fields can be overridden: `timm-gac train --help`.

    Args:
        recipe: cifar10, cifar100, cifar100_fast, imagenet, tiny_imagenet or in293 (each of these two after its
            ..._first).
    """
    return _train([recipe])


def _train(arguments: Sequence[str]) -> int:
    from .train.config import parse
    from .train.loop import train as run

    return run(*parse(arguments, "timm-gac train"))


def _parser() -> SubcommandApp:
    app, benchmarks = SubcommandApp(), SubcommandApp()
    app.command(demo)
    app.command(convert)
    app.command(quantize)
    app.command(models)
    app.command(data)
    app.command(train)
    app.command(name="eval")(evaluate)
    app.command(predict)
    app.command(push)
    app.command(verify)
    app.command(energy)
    app.command(inspect)
    app.command(anytime)
    benchmarks.command(name="kernels")(bench_kernels)
    benchmarks.command(name="model")(bench_model)
    app.command(benchmarks, name="bench", help="Benchmarks: `timm-gac bench kernels --help`.")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status is 0, 1 where a check failed, 2 where the user has to change something.

    Args:
        arguments: What follows ``timm-gac``; of the process where left out.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_gac").setLevel(logging.INFO)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["train"]:  # the trainer parses its own, so that it also runs without this command line
            return _train(given[1:])
        return _parser().cli(prog="timm-gac", description=DESCRIPTION, args=given)
    except (ValueError, OSError) as error:
        message = str(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0], "all")
        message = f"expected the optional package {error.name!r}, got none: install timm-gac[{extra}]"
    except KeyboardInterrupt:
        message = "interrupted"
    sys.stderr.write(f"timm-gac: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
