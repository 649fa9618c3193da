"""Checkpoints of a run: safetensors and JSON only; the last few are kept.

A checkpoint is a folder ``step_00000390`` with ``state.safetensors`` (weights, moving average, optimiser, random number
states) and ``state.json`` (position, recipe, data, and the sha256 of the tensors and of itself). It is written under
another name, flushed to the disk and then renamed, so a folder of that name is complete even after a crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..runtime.files import sync_folder, write_bytes, write_json

FORMAT, FIRST_FORMAT = "timm_gac.train/2", "timm_gac.train/1"  # the first had no hash of its state
TENSORS, STATE = "state.safetensors", "state.json"
_PREFIX, _PARTIAL = "step_", ".partial_"
# What `Run` reads from a state, and of which type.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "minutes": (int, float),
    "optimizer": dict,
    "processes": int,
    "scaler": (dict, type(None)),
    "recipe": dict,
    "sums": list,
}


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after a step.

    Attributes:
        tensors: Flat names to CPU tensors: ``model.*``, ``ema.*``, ``optimizer.<index>.<name>``, ``rng.*``.
        state: All else, ready for JSON: step, minutes, recipe, ...
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named ``prefix.*``, without the prefix."""
        start = len(prefix) + 1
        return {name[start:]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix + ".")}


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint of ``step`` and delete all but the last ``keep``.

    Args:
        folder: Folder of the run's checkpoints.
        step: Training steps done.
        checkpoint: State to write.
        keep: How many checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: It could not be written, such as on a full disk; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, partial = folder / f"{_PREFIX}{step:08d}", folder / f"{_PARTIAL}{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in checkpoint.tensors.items()}
        content = save(tensors, metadata={"format": FORMAT})
        write_bytes(partial / TENSORS, content)
        state = {"format": FORMAT, **checkpoint.state, "sha256": hashlib.sha256(content).hexdigest()}
        write_json(partial / STATE, state | {"state_sha256": _state_hash(state)})
        sync_folder(partial)
        if target.exists():  # the same step again, after a resume without progress
            shutil.rmtree(target)
        partial.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"checkpoint of step {step} not written to {folder} ({error.strerror}): earlier checkpoints are untouched; "
            "free some space and go on with --resume",
        ) from error
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, None if there is none."""
    found = _complete(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: It is damaged, incomplete, or no checkpoint of this trainer.
    """
    try:
        state = _read_state(path / STATE)
        if hashlib.sha256((path / TENSORS).read_bytes()).hexdigest() != state.get("sha256"):
            raise ValueError("the tensors' sha256 differs from the one written beside them")
        tensors = load_file(path / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, str(error)) from error
    return Checkpoint(tensors, state)


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a checkpoint that cannot be used."""
    return ValueError(
        f"expected a checkpoint of this trainer in {str(path)!r}, got a damaged or foreign one ({reason[:200]}): "
        "delete that folder to resume from the one before, or start anew in another run folder"
    )


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, FIRST_FORMAT):
        raise ValueError(f"no {FORMAT} checkpoint")
    digest = state.pop("state_sha256", None)
    if digest != _state_hash(state) and state["format"] != FIRST_FORMAT:
        raise ValueError(f"the sha256 of {file.name} differs from the one written in it")
    for name, kind in _ENTRIES.items():
        value = state.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} in {file.name} is {str(value)[:40]!r}")
    numbers = (state["step"], state["minutes"], *state["sums"])
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        raise ValueError(f"step, minutes or sums in {file.name} are no finite numbers")
    if len(state["sums"]) != 3:
        raise ValueError(f"sums in {file.name} are {len(state['sums'])} numbers, not 3")
    return state


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors and JSON."""
    tensors, plain = {}, dict[str, Any]()
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain[f"{index}.{name}"] = value
    return tensors, plain


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Restore what `optimizer_tensors` returned; learning rates are left to the schedule."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for full, value in [*tensors.items(), *plain.items()]:
        index, _, name = full.partition(".")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # In the parameter's memory format, which fused optimisers require and a file does not keep.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f"expected {name} of shape {tuple(parameter.shape)} for parameter {index}, got {tuple(value.shape)}: "
                "begin anew, or go on with the version of the package that the run began with"
            )
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    lrs = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr  # the tensor into which the schedule writes


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
