"""Checkpoints of the published code, read without running code and turned into model folders."""

from __future__ import annotations

import functools
import logging
import pickle
import struct
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict, is_model_in_modules
from torch import Tensor

from ..models.published import NETWORKS
from ..models.spiking_resnet import checkpoint_filter_fn
from ..runtime.files import check_new_folder
from .folder import refuse_run_folder, save_model_folder

_logger = logging.getLogger(__name__)

# Keys under which training scripts nest the tensors.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
# Types of weights; int8 are the integers of a network trained in 8 bits.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What the restricted unpickler and the archive readers raise on bytes that are not a checkpoint.
UNREADABLE = (
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
)


def check_file(file: Path) -> None:
    """Raise ValueError unless there is such a file."""
    if not file.is_file():
        raise ValueError(f"expected a checkpoint file, got {str(file)!r}, which is none: check the path")


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name, on the CPU; no code in the file is ever run.

    Args:
        file: A safetensors file, known by its content, or a pickle as written by ``torch.save`` (read with
            ``weights_only=True``): the state dict itself or a dict that holds it under a usual key. A
            ``module.`` prefix is removed.

    Raises:
        ValueError: There is no such file, it cannot be read without running code, or it holds no state dict.
    """
    check_file(file)
    try:
        if _is_safetensors(file):
            checkpoint: Any = safetensors.torch.load_file(file, device="cpu")
        else:
            with file.open("rb") as stream:  # a stream, as PyTorch goes by a path's suffix
                checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), type(error).__name__).strip()
        raise ValueError(
            f"expected a file of tensors, got {file.name!r}, which cannot be read without running code in it or is "
            f"damaged ({reason}): save its state dict alone, with torch.save or as safetensors"
        ) from error
    if isinstance(checkpoint, dict):
        # An empty one is skipped: scripts write the average of weights even where they keep none.
        wrapper = next((key for key in WRAPPERS if checkpoint.get(key) and isinstance(checkpoint[key], dict)), None)
        checkpoint = checkpoint if wrapper is None else checkpoint[wrapper]
    if not isinstance(checkpoint, dict) or not checkpoint:
        found = "an empty one" if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"expected a state dict, got {found} in {file.name!r}: save one with tensors")
    others = [key for key, value in checkpoint.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(
            f"expected tensors by name, got a non-tensor under {others[0]!r} in {file.name!r}: save these alone"
        )
    for key, value in checkpoint.items():
        _check_values(key, value, file)
    return clean_state_dict(checkpoint)


def _is_safetensors(file: Path) -> bool:
    """Whether a file is safetensors by its content, 8 bytes of a length and JSON; or, of a damaged one, by its name."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{" or (start[:2] != b"PK" and file.suffix.lower() == ".safetensors")


def _check_values(name: str, tensor: Tensor, file: Path) -> None:
    """Refuse a tensor whose values a network cannot hold: loading would cut an imaginary part off in silence.

    Counters, which have no axis, may be of any integer type.
    """
    is_counter = tensor.ndim == 0 and not tensor.is_floating_point() and not tensor.is_complex()
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not dense or not (is_counter or tensor.dtype in (*_FLOATS, torch.int8)):
        kind = "without values" if tensor.is_meta else "" if dense else f"in the layout {tensor.layout}"
        raise ValueError(
            f"expected dense floating-point tensors, got {name!r} of {tensor.dtype} {kind}".rstrip()
            + f" in {file.name!r}: save it as float32, with tensor.to_dense().float()"
        )


def infer_model(tensors: dict[str, Tensor]) -> str:
    """Name of the model whose published layout these tensors have.

    Raises:
        ValueError: The names are not those of a published network.
    """
    gac = "gac_" if any(name.startswith("encoding.") for name in tensors) else ""
    cifar = "layer1.0.conv1.weight" in tensors
    for base, (_, depths, _, _) in NETWORKS.items():
        if base.endswith("_cifar") != cifar:
            continue
        stage = "layer{}" if cifar else "conv{}_x"
        expected = {f"{stage.format(i + (1 if cifar else 2))}.{d}" for i, n in enumerate(depths) for d in range(n)}
        if expected == {name.removesuffix(".conv2.weight") for name in tensors if name.endswith(".conv2.weight")}:
            return gac + base
    raise ValueError(
        f"expected the tensor names of a published network, got {len(tensors)} such as {next(iter(tensors))!r}: "
        "name the model, or convert a checkpoint of the published code"
    )


def _size(tensors: dict[str, Tensor], names: tuple[str, ...], axis: int, ndim: int) -> int | None:
    """Length of an axis of the first of these tensors that is there; None where none is.

    Raises:
        ValueError: The tensor has another rank.
    """
    name = next((name for name in names if name in tensors), None)
    if name is None:
        return None
    if tensors[name].ndim != ndim:
        raise ValueError(f"expected {name} with {ndim} axes, got {tuple(tensors[name].shape)}: check the file")
    return tensors[name].shape[axis]


def convert_checkpoint(
    file: Path,
    out: Path,
    model: str | None = None,
    num_classes: int | None = None,
    num_steps: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a checkpoint of the published code into a model folder without pickles.

    Values are stored in the file's floating-point type, so nothing is rounded: a float64 file gives a float64
    ``model.safetensors``, which ``timm.create_model`` reads as float32 unless it is given ``dtype=torch.float64``.

    Args:
        file: Checkpoint in the published layout, a pickle of tensors (``.pth``, ``.pt``, ``.pth.tar``) or safetensors.
        out: Folder to write ``config.json`` and ``model.safetensors`` to.
        model: Model name; inferred from the tensor names if not given.
        num_classes: Number of classes; inferred from the head if not given, and an error if it differs from it.
        num_steps: Time steps T; inferred from the temporal attention if not given. Another T resamples it. A network
            with direct coding stores no T: it gets the model's default.
        overwrite: Replace the two files in a folder that is not empty.

    Returns:
        The folder, to be loaded by ``timm.create_model('local-dir:OUT', pretrained=True)``.

    Raises:
        ValueError: The file is unreadable, needs code to be run, or does not fit the model; or the folder is not empty
            or is a run folder.
    """
    file, out = Path(file), Path(out)
    check_file(file)
    check_new_folder(out, overwrite)
    refuse_run_folder(out, "the model")
    tensors = read_checkpoint(file)
    name = infer_model(tensors) if model is None else model
    if not is_model_in_modules(name, ["spiking_resnet"]):
        raise ValueError(f"expected a model of this package, got {name!r}: see timm.list_models('*msresnet*')")

    classes = _size(tensors, ("fc1.weight", "fc.weight"), axis=0, ndim=2)
    if classes is None:
        if num_classes != 0:
            raise ValueError(
                f"expected a head (fc.weight) in {file.name!r}, got none: give num_classes=0 (--num-classes 0) for a "
                "network of features, without classes"
            )
        classes = 0
    if num_classes is not None and num_classes != classes:
        raise ValueError(f"expected num_classes={classes} as in the file's head, got {num_classes}: leave it out")
    published_steps = _size(tensors, ("encoding.TA.sharedMLP.0.weight",), axis=1, ndim=5)
    stored_steps = published_steps or _size(tensors, ("encoder.temporal.fc1.weight",), axis=1, ndim=2)
    steps = stored_steps if num_steps is None else num_steps  # 0 is refused by the network, not replaced
    in_chans = _size(tensors, ("conv1.0.weight", "conv1.weight"), axis=1, ndim=4)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    # bfloat16 and float16 in one file make float32: neither holds the values of the other.
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    network = timm.create_model(name, num_classes=classes, num_steps=steps, in_chans=in_chans, dtype=dtype)
    try:
        network.load_state_dict(checkpoint_filter_fn(tensors, network), strict=True)
    except (RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(
            f"expected the tensors of {name}, got others in {file.name!r} ({detail}): name the right model"
        ) from error
    _logger.info("%s: %s, %s classes, %s time steps, stored as %s", file.name, name, classes, network.num_steps, dtype)
    return save_model_folder(network, out)
