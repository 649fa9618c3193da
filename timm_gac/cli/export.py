"""``timm-gac export``: a network as a file that other programs run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .output import check_new_files, check_packages, create_console
from .sources import AnyNetworkOptions, Model, SetOptions, check_positive, fold_network, open_images

if TYPE_CHECKING:
    from torch import Tensor

# Beside PyTorch, what each format needs, and the options that it cannot heed.
PACKAGES = {".nir": ("nir",), ".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
OTHERS = {
    ".nir": ("batch_size", "frames", "per_step", "compiled", "kernels", "opset"),
    ".onnx": ("compiled", "kernels"),
    ".pt2": ("opset",),
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(AnyNetworkOptions, SetOptions):
    """What `run_export` does.

    Args:
        data: Images for the check: a picture, a folder of pictures, an .npz file, digits, or the name of a data set in
            timm. Noise where left out.
        images: At most so many of them.
        fold: Fold batch norms into the convolutions: the same answers up to rounding. NIR files always are.
        dtype: What the file computes in. In float64 rounding flips no spike; 16 bits are for a .pt2.
        batch_size: A fixed batch size; any where left out.
        frames: The input are event frames (B, T, C, H, W), not images.
        per_step: The output are the logits of each time step (B, T, classes), not their mean.
        compiled: Compile a .pt2 for this kind of processor with AOTInductor, for C++ or Python; for a GPU with this
            package's kernels inside.
        kernels: Keep the operators of gac_kernels in a .pt2. The reader has to import gac_kernels; it then has the
            kernels on a GPU, and int8 arithmetic on a CPU.
        opset: ONNX's version of the operators, 20 to 23; the newest where left out.
        overwrite: Replace the file.
    """

    data: str | None = None
    images: int = 32
    fold: bool = True
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    batch_size: int | None = None
    frames: bool = False
    per_step: bool = False
    compiled: bool = False
    kernels: bool = False
    opset: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "images", "batch_size")
        if self.frames and self.data is not None:
            raise ValueError("expected --frames without --data, got both: frames are checked on noise")


def export(
    model: Model,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.{nir,onnx,pt2}")],
    config: Annotated[ExportConfig, tyro.conf.arg(name="")],
) -> int:
    """Write a network for NIR, ONNX or PyTorch alone.

    The file's name says the format. The file is read back and its answers are compared with the network's.

    .nir holds neurons, convolutions, pooling and sums, for snnTorch, SpikingJelly and others. Its input is the gated
    current behind the encoder, whose gate NIR cannot write; with direct coding the image. No 8-bit weights, no soft
    reset. .onnx holds the whole network, T steps one after the other, floating-point or with 8-bit weights. .pt2 holds
    the whole network for torch.export.load, without this package and to the same bits; or with --compiled a package
    of AOTInductor. 8-bit weights are those of a folder that `timm-gac quantize` wrote.

    Example: timm-gac export gac_msresnet18_cifar.cifar100 gac.onnx

    Args:
        model: The network.
        out: The file to write.
        config: What to write, and what to check it on.
    """
    return run_export(model, out, config)


def run_export(model: str, out: Path, config: ExportConfig, console: Any = None) -> int:
    """Write a network as a file, read it back and show how its answers differ.

    Random weights get the batch-norm statistics of the images of the check, as their neurons would not fire otherwise.

    Returns:
        0, or 1 where the file does not answer as the network does.

    Raises:
        ValueError: There is no such network, format or image, the format cannot hold the network, or the file is there.
        ModuleNotFoundError: A package of the ``export`` extra is missing.
    """
    suffix = _check(out, config)

    from ..export.report import example_images
    from ..hub import open_network
    from ..runtime.device import resolve_device
    from ..runtime.terminal import plain

    device = resolve_device(config.device) if suffix == ".pt2" else "cpu"
    opened = open_network(model, config.num_steps, config.seed, device)
    if suffix == ".nir":
        opened.require_spiking("a NIR file")
    if config.frames:
        opened.require_spiking("event frames")
    network: Any = opened.network
    images: Any = None
    if config.data is not None:
        images = open_images(config.data, network, config.images, config.data_dir, config.split)
    images = example_images(network, images, config.frames)
    opened.calibrate_untrained([images])
    if config.dtype == "float64":
        network, images = network.double(), images.double()
    if config.fold:
        network = fold_network(network, "float32")
    if config.dtype in ("bfloat16", "float16"):
        import torch

        half = getattr(torch, config.dtype)
        network, images = network.to(half), images.to(half)
    report = _write(network, out, images, opened.label_names, config)
    console = console or create_console()
    size = out.stat().st_size / 2**20
    console.print(plain(f"wrote {out} ({size:.1f} MiB; weights {opened.origin})"), markup=False)
    for line in str(report).splitlines():
        console.print(plain(line), markup=False)
    return 0 if _answers(report, suffix, config, images.device.type) else 1


def _check(out: Path, config: ExportConfig) -> str:
    """The file's suffix, after all checks that need no network."""
    suffix = out.suffix.lower()
    if suffix not in PACKAGES:
        raise ValueError(
            f"expected OUT to end in {' or '.join(PACKAGES)}, got {str(out)!r}: the suffix says the format"
        )
    for name in OTHERS[suffix]:
        if getattr(config, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"expected no {option} for a {suffix} file, got it: leave it out")
    if suffix != ".pt2" and config.dtype in ("bfloat16", "float16"):
        raise ValueError(f"expected --dtype float32 or float64 for a {suffix} file, got {config.dtype}: write a .pt2")
    if suffix != ".pt2" and config.device not in ("auto", "cpu"):
        raise ValueError(f"expected no --device for a {suffix} file, got {config.device!r}: it is written on the CPU")
    check_new_files(out.parent, [out.name], config.overwrite, "OUT")
    check_packages(*PACKAGES[suffix])
    return suffix


def _write(network: Any, out: Path, images: Tensor, labels: tuple[str, ...], config: ExportConfig) -> Any:
    from .. import export as formats

    if out.suffix.lower() == ".nir":
        return formats.write_nir(network, out, images=images, label_names=labels, overwrite=config.overwrite)
    shared: dict[str, Any] = {
        "images": images,
        "batch_size": config.batch_size,
        "per_step": config.per_step,
        "overwrite": config.overwrite,
    }
    if out.suffix.lower() == ".onnx":
        shared |= {} if config.opset is None else {"opset": config.opset}
        return formats.write_onnx(network, out, label_names=labels, **shared)
    if config.compiled:
        return formats.compile_package(network, out, plain=not config.kernels, **shared)
    return formats.write_program(network, out, plain=not config.kernels, label_names=labels, **shared)


def _answers(report: Any, suffix: str, config: ExportConfig, device: str) -> bool:
    """Whether a file answers as the network does, up to spikes that rounding flips where sums have another order."""
    if suffix == ".nir":
        return bool(report.flips <= 0.01 * report.spikes)
    if suffix == ".pt2" and not config.compiled and device == "cpu":
        return bool(report.largest_difference <= 1e-5)
    return bool(4 * report.flips <= report.images and math.isfinite(report.largest_difference))
