"""``timm-gac quantize``: weights of 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..runtime.terminal import plain
from .output import check_writable, create_console
from .sources import TrainedModel


def quantize(
    model: TrainedModel,
    out_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_FOLDER")],
    clip: Literal["max", "mse"] = "mse",
    overwrite: bool = False,
    exact_sums: bool = False,
) -> int:
    """Round a network's weights to 8 bits, for integer inference.

    Example: timm-gac quantize gac_msresnet18_cifar.cifar100 quantized

    Args:
        model: The network.
        out_folder: Folder to write.
        clip: Scale a channel by its largest weight, or by the least squared error.
        overwrite: Replace the model in a folder that has one.
        exact_sums: Let shortcuts round no sum, so that other programs get the same integers (see docs/deployment.md).
    """
    from ..hub import open_network, save_quantized

    check_writable(out_folder, "OUT_FOLDER")
    source = Path(model.removeprefix("local-dir:"))
    if out_folder.is_dir() and out_folder.resolve() in [source.resolve(), (source / "model").resolve()]:
        raise ValueError(  # 8 bits would take the place of the original
            f"expected another folder than the model's for OUT_FOLDER, got {str(out_folder)!r}: choose another"
        )
    opened = open_network(model).require_trained().require_spiking("8-bit inference")
    folder = save_quantized(opened.network, out_folder, clip, overwrite, exact_sums)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    load = f"timm_gac.hub.load_model('{folder}')"
    text = f"wrote {folder} ({size:.1f} MiB; weights {opened.origin}): load it with {load}"
    create_console().print(plain(text), markup=False)
    return 0
