"""Networks as PyTorch's .pt2 files: exported programs, and packages that AOTInductor compiles of them."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gac_kernels.decompositions import decomposition_table
from gac_kernels.embedding import EMBEDDED, embedded_kernels, why_not_embedded

from ..runtime.files import replace_file, write_bytes
from ..runtime.modes import eval_mode
from .inductor import PackageProcess, Phases, check_compiler, compile_program
from .report import (
    ExportReport,
    check_batch_size,
    check_network,
    check_new,
    compare,
    cycled,
    description,
    example_images,
    without_autocast,
)

DESCRIPTION = "timm_gac.json"  # the file within a .pt2 that says what the network is


class PerStep(nn.Module):
    """A network whose output are the logits of each step, ``(B, T, num_classes)``.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each step of images or frames x."""
        logits: Tensor = self.network.forward_steps(x)  # type: ignore[operator]
        return logits


@without_autocast
@torch.no_grad()
def export_program(
    model: nn.Module, images: Tensor, *, batch_size: int | None = None, per_step: bool = False, plain: bool = True
) -> ExportedProgram:
    """A network as `torch.export` gives it, without operators of this package.

    Args:
        model: A network of this package: floating-point, folded or quantised. It is left as it is.
        images: To trace it with, ``(B, C, H, W)`` or event frames ``(B, T, C, H, W)``, any B.
        batch_size: The program's batch size; None for any.
        per_step: Its output are the logits of each step.
        plain: Replace this package's operators by PyTorch's own. Without it the program wants `gac_kernels`.

    Raises:
        ValueError: An operator is left that has no plain form, or ``batch_size`` is below 1.
    """
    check_batch_size(batch_size)
    if any(tensor.is_inference() for tensor in model.state_dict().values()):
        raise ValueError(
            "expected a network that autograd knows, got one made in torch.inference_mode: make it outside"
        )
    if plain and getattr(model, "int8_convs", False) and not getattr(model, "inference_only", False):
        raise ValueError(
            "expected a network with int8_convs folded or quantised, got one that trains in 8 bits: fold a copy with "
            "timm_gac.fuse_for_inference, whose answers are the same up to rounding, or call timm_gac.quantize (on the "
            "command line leave out --no-fold)"
        )
    images = cycled(images, batch_size or max(len(images), 2))  # of 1 image torch.export would make a batch size of 1
    shapes = ({0: Dim("batch", min=1)},) if batch_size is None else None
    with eval_mode(model):
        network = PerStep(model).eval() if per_step else model
        # Of a view the program would have symbols that it never uses, of which each reader is then warned.
        program = torch.export.export(network, (images.clone(),), dynamic_shapes=shapes)
    if not plain:
        return program
    program = program.run_decompositions(decomposition_table())
    left = _operators(program)
    if left:
        raise ValueError(
            f"expected operators that PyTorch's own can replace, got {', '.join(sorted(left))}: export the network as "
            "timm.create_model makes it, or give plain=False"
        )
    return program


def _operators(program: ExportedProgram) -> set[str]:
    """This package's operators in a program."""
    return {str(node.target) for node in program.graph.nodes if "gac_kernels" in str(node.target)}


def _check_embedded(program: ExportedProgram) -> None:
    if left := _operators(program) - EMBEDDED:
        raise ValueError(
            f"expected operators of inference, got {', '.join(sorted(left))}: export the network as timm.create_model "
            "makes it, or give plain=False"
        )


def _prepared(
    model: Any, images: Tensor | None, frames: bool, batch_size: int | None, per_step: bool, plain: bool
) -> tuple[ExportedProgram, Tensor]:
    """The program, and the images to check it with."""
    check_batch_size(batch_size)
    images = example_images(model, images, frames)
    traced = cycled(images, batch_size or 2)
    return export_program(model, traced, batch_size=batch_size, per_step=per_step, plain=plain), images


def _checked(
    path: Path,
    contents: str,
    model: Any,
    per_step: bool,
    images: Tensor,
    run: Any,
    batch: int | None,
    exact: bool = False,
) -> ExportReport:
    with eval_mode(model):
        return compare(path, contents, PerStep(model) if per_step else model, images, run, batch, exact)


@without_autocast
def write_program(
    model: Any,
    path: str | Path,
    *,
    images: Tensor | None = None,
    frames: bool = False,
    batch_size: int | None = None,
    per_step: bool = False,
    plain: bool = True,
    label_names: tuple[str, ...] = (),
    overwrite: bool = False,
) -> ExportReport:
    """Write a network as a .pt2 file that `torch.export.load` reads, in a process without this package.

    On a CPU its answers are the network's to the bit. It runs where the network is now, CPU or GPU.

    Args:
        model: A network of this package: floating-point, folded or quantised. It is left as it is.
        path: The file. It appears whole or not at all.
        images: Normalised images to compare on, ``(B, C, H, W)`` or frames ``(B, T, C, H, W)``; noise by default.
        frames: Without images, take event frames ``(B, T, C, H, W)`` as input.
        batch_size: A fixed batch size; None for any.
        per_step: The output are the logits of each step, ``(B, T, num_classes)``.
        plain: With PyTorch's own operators alone. Without it this package's stay, and with them its kernels, and
            int8 arithmetic on a CPU; the reader has to ``import gac_kernels`` before.
        label_names: Of the classes, for `DESCRIPTION` in the file.
        overwrite: Replace the file where there is one.

    Returns:
        How the file's answers differ from the network's.

    Raises:
        ValueError: The file is there, or the network cannot be written.

    Examples:
        >>> import timm, timm_gac.export
        >>> model = timm.create_model("test_gac_msresnet").eval()
        >>> report = timm_gac.export.write_program(model, "test.pt2")  # doctest: +SKIP
    """
    path = Path(path)
    check_new(path, overwrite)
    program, images = _prepared(model, images, frames, batch_size, per_step, plain)
    about = json.dumps(description(model, label_names))
    contents = "exported program for PyTorch alone" if plain else "exported program for PyTorch with gac_kernels"
    with replace_file(path) as stream:  # a file that cannot be run does not appear
        torch.export.save(program, stream, extra_files={DESCRIPTION: about})
        stream.flush()
        with Path(stream.name).open("rb") as written:
            run = torch.export.load(written).module()
        exact = images.device.type == "cpu"
        return _checked(path, contents, model, per_step, images, run, batch_size, exact)


@without_autocast
def compile_package(
    model: Any,
    path: str | Path,
    *,
    images: Tensor | None = None,
    frames: bool = False,
    batch_size: int | None = None,
    per_step: bool = False,
    plain: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Compile a network with AOTInductor into a .pt2 package, for C++ or ``torch._inductor.aoti_load_package``.

    It holds machine code for the kind of processor that it is compiled on, and wants a C++ compiler there, for a GPU
    with CUDA's headers. On a GPU this package's Triton kernels are inside, as machine code too, but not in float64 nor
    for other neurons than ``lif``. For Hopper's convolutions in one pass cuDNN's convolution and a neuron kernel stand
    there, or with 8-bit weights the kernel in plain Triton. Sums in another order differ in their last bits, as between
    any two kernels. Images have to be contiguous: generated code relies on it. The log says what it does and for how
    long, as it takes about a minute. A plain package is compared in a process of its own, which does without this one.

    Args:
        model: As for `write_program`. It is compiled for the device on which it is.
        path: The file, .pt2. It appears whole or not at all.
        images: As there.
        frames: As there.
        batch_size: As there.
        per_step: As there.
        plain: Runs in any process, by PyTorch's own operators and, on a GPU, kernels. Without it the package calls this
            package's operators, so only a Python process that has imported `gac_kernels` can run it.
        overwrite: Replace the file where there is one.

    Returns:
        How the package's answers differ from the network's.

    Raises:
        ValueError: The file is there, the network cannot be written, or there is no C++ compiler.
        RuntimeError: The package crashes; it is not written then.
    """
    path = Path(path)
    check_new(path, overwrite)
    check_network(model)
    neuron = model.spec.neuron if hasattr(model, "spec") else None  # an ANN has none, nor operators to embed
    embedded = plain and neuron == "lif" and not why_not_embedded(next(model.parameters()))
    # Kernels and convolutions on a GPU want weights channels-last; of others each call would make a copy.
    network = copy.deepcopy(model).to(memory_format=torch.channels_last) if embedded else model
    phases = Phases()
    phases.begin("tracing the network")
    program, images = _prepared(network, images, frames, batch_size, per_step, plain and not embedded)
    if embedded:
        _check_embedded(program)
    check_compiler()
    if plain:
        inside = "generated code and Triton kernels of gac_kernels" if embedded else "generated code alone"
    else:
        inside = "generated code that calls the operators of gac_kernels"
    contents = f"compiled for this {images.device.type.upper()}: {inside}"
    with TemporaryDirectory() as folder, PackageProcess(images.device) if plain else nullcontext() as process:
        compiled = Path(folder) / "package.pt2"
        phases.begin("compiling with AOTInductor")
        with embedded_kernels() if embedded else nullcontext():
            compile_program(program, compiled)
        phases.begin("running the package in a process of its own" if process else "running the package")
        run: Any = process
        if process is None:
            run = torch._inductor.aoti_load_package(str(compiled))
        else:
            process.package = compiled
        report = _checked(path, contents, model, per_step, images, run, batch_size)
        write_bytes(path, compiled.read_bytes())
    phases.end(f"wrote {path}")
    return report
