"""Networks as ONNX files, whose operators are all ONNX's own: T steps, one after the other."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from ..runtime.files import replace_file
from ..runtime.modes import eval_mode
from .program import PerStep, export_program
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

# The newest that torch.onnx writes. ONNX Runtime reads it from 1.22 on.
OPSET = 23
_LIMIT = 2**31 - 2**20  # bytes of a file with its weights inside


@without_autocast
def write_onnx(
    model: Any,
    path: str | Path,
    *,
    images: Tensor | None = None,
    frames: bool = False,
    batch_size: int | None = None,
    per_step: bool = False,
    label_names: tuple[str, ...] = (),
    opset: int = OPSET,
    overwrite: bool = False,
) -> ExportReport:
    """Write a network as an ONNX file, and compare what ONNX Runtime computes of it.

    The input is ``images``, the output ``logits``. 8-bit weights stay 8 bits in the file. ONNX Runtime adds them up as
    float32, which holds all their sums: those of its ConvInteger, five times as fast on a CPU. In float64, in which
    ONNX Runtime has no convolutions, they are matrix products.

    Args:
        model: A network of this package: floating-point, folded or quantised, float32 or float64. It is left as it is.
        path: The file. It appears whole or not at all.
        images: Normalised images to compare on, ``(B, C, H, W)`` or frames ``(B, T, C, H, W)``; noise by default.
        frames: Without images, take event frames ``(B, T, C, H, W)`` as input.
        batch_size: A fixed batch size; None for any.
        per_step: The output are the logits of each step, ``(B, T, num_classes)``.
        label_names: Of the classes, for the file's metadata.
        opset: ONNX's version of the operators, 20 to 23.
        overwrite: Replace the file where there is one.

    Returns:
        How the file's answers differ from the network's.

    Raises:
        ValueError: The file is there, the network cannot be written, or it has another dtype.
        ModuleNotFoundError: ``pip install "timm-gac[export]"`` was not run.

    Examples:
        >>> import timm, timm_gac.export
        >>> model = timm.create_model("test_gac_msresnet").eval()
        >>> report = timm_gac.export.write_onnx(model, "test.onnx")  # doctest: +SKIP
    """
    import onnxruntime  # noqa: F401 (missing, it is so before the work)

    path = Path(path)
    check_new(path, overwrite)
    check_network(model)
    check_batch_size(batch_size)
    if not isinstance(opset, int) or not 20 <= opset <= OPSET:
        raise ValueError(f"expected an opset from 20 to {OPSET}, got {opset}: PyTorch writes no other")
    weight = next(model.parameters())
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a network in float32 or float64, got {weight.dtype}: call its .float() first")
    network = model if weight.device.type == "cpu" else copy.deepcopy(model).cpu()
    images = example_images(network, images, frames)
    program = export_program(network, cycled(images, batch_size or 2), batch_size=batch_size, per_step=per_step)
    contents = f"ONNX of opset {opset}"
    with replace_file(path) as stream, eval_mode(network):  # a file that cannot be run does not appear
        stream.write(_serialised(program, opset, description(model, label_names)))
        stream.flush()
        run = _runtime(Path(stream.name))
        shown = PerStep(network) if per_step else network
        return compare(path, contents, shown, images, run, batch_size)


def _runtime(file: Path) -> Callable[[Tensor], Tensor]:
    """What ONNX Runtime computes of a file, images to logits.

    Raises:
        ValueError: It cannot read the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own, each derived from Exception
        raise ValueError(
            f"expected a file that ONNX Runtime {onnxruntime.__version__} reads, got one that it refuses "
            f"({' '.join(str(error).split())}): install a newer one, or write opset 20"
        ) from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _serialised(program: ExportedProgram, opset: int, about: dict[str, Any]) -> bytes:
    """The program as an ONNX file's bytes."""
    if any(parameter.dtype == torch.float64 for parameter in program.parameters()):
        program = program.run_decompositions({torch.ops.aten.conv2d.default: _convolution})
    with _quiet():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
        )
    assert exported is not None
    model = exported.model_proto
    for name, value in about.items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    if model.ByteSize() > _LIMIT:
        raise ValueError(
            f"expected a network below 2 GiB, which is all that an ONNX file holds, got {model.ByteSize() / 2**30:.1f} "
            "GiB: write a .pt2 file"
        )
    content: bytes = model.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter's libraries report of their passes, within ``with``."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: list[int] = [1, 1],  # noqa: B006 (as the operator's schema has it)
    padding: list[int] = [0, 0],  # noqa: B006
    dilation: list[int] = [1, 1],  # noqa: B006
    groups: int = 1,
) -> Tensor:
    """A convolution as one matrix product over its taps, side by side; one with groups or dilation stays as it is."""
    if groups != 1 or list(dilation) != [1, 1]:
        return NotImplemented
    rows, columns = weight.shape[2:]
    x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    height, width = (x.shape[2] - rows) // stride[0] + 1, (x.shape[3] - columns) // stride[1] + 1
    taps = [
        x[:, :, i : i + stride[0] * (height - 1) + 1 : stride[0], j : j + stride[1] * (width - 1) + 1 : stride[1]]
        for i in range(rows)
        for j in range(columns)
    ]
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (C', taps * C)
    y = torch.matmul(matrix, torch.cat(taps, 1).flatten(2)).unflatten(2, (height, width))
    return y if bias is None else y + bias[:, None, None]
