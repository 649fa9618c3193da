"""The command line ``timm-gac``: each subcommand is one function, whose imports wait until it is called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

from .benchmark import KernelBenchConfig
from .demo import DemoConfig

DESCRIPTION = "Gated attention coding and spiking ResNets for timm: demonstrate, convert, benchmark and list."


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> int:
    """Train a small network on real handwritten digits (CPU, about a minute), save it, reload it and draw its spikes."""
    from .demo import run_demo

    return run_demo(config)


def convert(
    file: tyro.conf.Positional[Path],
    out_folder: tyro.conf.Positional[Path],
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


def models(pattern: tyro.conf.Positional[str] = "*") -> int:
    """List the registered models with their encoder, neuron dialect, parameters, time steps T and input.

    Args:
        pattern: Show only names that match, such as 'gac_*'.
    """
    import timm
    import torch
    from rich.console import Console
    from rich.table import Table

    from . import CIFAR, IMAGENET, GatedAttentionCoding

    names = timm.list_models(pattern, module="spiking_resnet")
    if not names:
        raise ValueError(f"expected a pattern that matches a model, got {pattern!r}: try '*resnet*'")
    table = Table(title=f"{len(names)} models")
    table.add_column("model", no_wrap=True)
    table.add_column("encoder")
    table.add_column("dialect")
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


def _parser() -> SubcommandApp:
    app, benchmarks = SubcommandApp(), SubcommandApp()
    app.command(demo)
    app.command(convert)
    app.command(models)
    benchmarks.command(bench_kernels, name="kernels")
    app.command(benchmarks, name="bench", help="Benchmarks: `timm-gac bench kernels --help`.")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 where a check failed, 2 where the user has to change something.

    Args:
        arguments: What follows ``timm-gac``; of the process where left out.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_gac").setLevel(logging.INFO)
    try:
        return _parser().cli(prog="timm-gac", description=DESCRIPTION, args=arguments)
    except (ValueError, OSError) as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"expected the optional package {error.name!r}, got none: install timm-gac[all]"
    except KeyboardInterrupt:
        message = "interrupted"
    sys.stderr.write(f"timm-gac: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
