"""Model and accelerator of a recipe."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from torch import nn

from ..hub.config import is_ann, read_config
from ..hub.folder import check_storable
from ..hub.open import is_registered
from ..hub.remote import exists, open_source
from ..runtime.collectives import share_tensors
from .idle import refuse_idle
from .recipes import RECIPES, Recipe

_logger = logging.getLogger(__name__)

MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_STATES: tuple[Any, ...] = (AcceleratorState, PartialState, GradientState)
_RUNNING = threading.Lock()
_newest: weakref.ReferenceType[Accelerator] | None = None


@contextmanager
def accelerate_state() -> Iterator[None]:
    """Restore accelerate's state, which all of a process shares, at the end of the block."""
    before = [dict(state._shared_state) for state in _STATES]
    try:
        yield
    finally:
        for state, content in zip(_STATES, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)


@contextmanager
def running(accelerator: Accelerator) -> Iterator[None]:
    """Mark a run as the one that trains in this process.

    Raises:
        ValueError: Another one trains, or another accelerator has been created, which shares its state with this one.
    """
    if _newest is None or _newest() is not accelerator:
        raise ValueError("expected the newest trainer of this process, got an older one: create it anew before it runs")
    if not _RUNNING.acquire(blocking=False):
        raise _second_run()
    try:
        yield
    finally:
        _RUNNING.release()


def _second_run() -> ValueError:
    return ValueError(
        "expected one training run at a time in a process, got a second one, whose random numbers and accelerate's "
        "state are the same: wait for the first to end, or start another process"
    )


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that accelerate does not know, and those it would leave out as they are not installed.

    Raises:
        ValueError: There is one.
    """
    own = {tracker.value for tracker in LoggerType}
    known = sorted(own | {str(name) for name in LOGGER_TYPE_TO_CLASS})  # others may have been registered
    installed = {"all", *(str(tracker) for tracker in get_available_trackers())}
    for name in names:
        if name not in known:
            raise ValueError(f"expected trackers among {', '.join(known)}, got {name!r}: choose of these")
        if name in own - installed:
            raise ValueError(f"expected an installed tracker, got {name!r}, which is not: install its package with pip")


def create_accelerator(recipe: Recipe, folder: Path, trackers: tuple[str, ...], cpu: bool) -> Accelerator:
    """The accelerator of a recipe, with a state of its own: an earlier run's settings are forgotten.

    Raises:
        ValueError: The recipe asks for what this device cannot do, accelerate is configured to shard the weights, or
            another run is training in this process.
    """
    global _newest
    if _RUNNING.locked():
        raise _second_run()
    check_trackers(trackers)
    for state in _STATES:
        state._shared_state.clear()
    if recipe.precision == "float16" and (cpu or not torch.cuda.is_available()):
        raise ValueError(_not_on_cpu(recipe))
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION[recipe.precision],
        gradient_accumulation_steps=recipe.grad_accumulation,
        log_with=list(trackers) or None,
        project_dir=str(folder),
        cpu=cpu,
        dynamo_backend="inductor" if recipe.compile else None,
    )
    _newest = weakref.ref(accelerator)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"expected one GPU or several with DDP, got {accelerator.distributed_type.value}: this trainer keeps whole "
            "weights on each process; choose MULTI_GPU in accelerate's configuration"
        )
    if recipe.cuda_graph and accelerator.device.type != "cuda":
        raise ValueError(_not_on_cpu(recipe))
    if recipe.cuda_graph:
        reasons = {
            "NCCL between the processes": accelerator.num_processes == 1 or "cuda:nccl" in dist.get_backend_config(),
            "precision bfloat16 or float32": recipe.precision != "float16",
            "grad_accumulation 1": recipe.grad_accumulation == 1,
            "batches of one size (stream off)": not recipe.stream,
        }
        missing = [name for name, holds in reasons.items() if not holds]
        if missing:
            raise ValueError(f"expected {', '.join(missing)} for cuda_graph, got otherwise: give --no-cuda-graph")
    return accelerator


def _not_on_cpu(recipe: Recipe) -> str:
    """All that a recipe asks for and a CPU cannot do, and what to give instead."""
    needed = {"--no-cuda-graph": "cuda_graph"} if recipe.cuda_graph else {}
    needed |= {"--precision float32": "precision float16"} if recipe.precision == "float16" else {}
    slow = " --precision float32 (bfloat16 is slower on most CPUs)" if recipe.precision == "bfloat16" else ""
    return (
        f"expected a CUDA device for {' and '.join(needed.values())}, got a CPU: give "
        f"{' '.join(needed)}{slow}, or start with the recipe digits, made for CPUs"
    )


def settled(recipe: Recipe, recipe_name: str, *, resumed: bool = False) -> Recipe:
    """The recipe as it is run and recorded: with the model of its initial weights, and for an ANN with one time step
    and plain cross entropy.

    Args:
        recipe: As it was given.
        recipe_name: Name of the recipe that it was made of, see `refuse_idle`.
        resumed: Refuse nothing that would change nothing: the recipe is that of a run which has begun.

    Raises:
        ValueError: A field would change nothing, such as a gate for an ANN, or there are no such initial weights, or
            they are of another model than the one that was named.
    """
    if recipe.init is not None:
        given = recipe.model.partition(".")[0]
        try:
            recipe = dataclasses.replace(recipe, model=_architecture(recipe))
        except ValueError as error:
            if not resumed:
                raise
            raise ValueError(
                f"expected the initial weights that this run began with, whose network --resume builds: {error}; put "
                "them back where they were"
            ) from error
        usual = RECIPES[recipe_name].model if recipe_name in RECIPES else given
        if not resumed and given not in (usual, recipe.model):
            raise ValueError(
                f"expected initial weights of {given}, which --model names, got {recipe.init!r} of {recipe.model}: "
                "leave --model out, or give other weights"
            )
    architecture = _architecture(recipe)
    ann = is_ann(architecture)
    if not resumed:
        refuse_idle(recipe, recipe_name, architecture if ann else None)
    if not ann:
        return recipe
    return dataclasses.replace(recipe, num_steps=1, loss="mean")


def _architecture(recipe: Recipe) -> str:
    """Name of the registered network that a recipe trains: that of its initial weights where it has any."""
    name = recipe.init or recipe.model
    if recipe.init is None or is_registered(name):
        return name.partition(".")[0]
    config = read_config(open_source(name))
    if "quantization" in config:
        raise ValueError(f"expected initial weights in floating point, got 8-bit ones, {name!r}: give the original")
    return str(config["architecture"])


def _source(recipe: Recipe) -> str:
    """What timm is to build: a registered network, or that of a folder or of a repository of the Hub."""
    name = recipe.init or recipe.model
    if recipe.init is None or is_registered(name) or name.startswith("hf-hub:"):
        return name
    return f"local-dir:{open_source(name)}"


def with_brought(recipe: Recipe, network: Any) -> Recipe:
    """The recipe with the gate and the neuron that its initial weights brought, as it is recorded."""
    if recipe.init is None or is_ann(recipe.model):
        return recipe
    args = network.model_args()
    return dataclasses.replace(recipe, gate=args["gate"], neuron=args["neuron"])


def create_network(recipe: Recipe, num_classes: int, in_chans: int) -> Any:
    """The recipe's network in float32, with its initial weights.

    Raises:
        ValueError: The model is unknown, or not of this package, so that it could not be stored in the end.
    """
    options: dict[str, Any] = dict(
        num_classes=num_classes,
        drop_rate=recipe.drop_rate,
        drop_path_rate=recipe.drop_path_rate,
    )
    ann = is_ann(_architecture(recipe))
    if not ann:
        options["num_steps"] = recipe.num_steps
    if recipe.gate != "full":
        options["gate"] = recipe.gate
    if recipe.neuron != "lif":
        options["neuron"] = recipe.neuron
    if in_chans != 3 or recipe.init is not None:  # stored weights may have another number
        options["in_chans"] = in_chans
    try:
        network: Any = timm.create_model(_source(recipe), pretrained=recipe.init is not None, **options)
    except (RuntimeError, TypeError) as error:
        name = recipe.init or recipe.model
        if recipe.init is not None:
            folder = f"; the folder of that name is './{name}'" if exists(Path(name)) and is_registered(name) else ""
            raise ValueError(
                f"expected initial weights, got {name!r} ({error}): give a name.tag of `timm-gac models`, a model or "
                f"run folder, or ORG/NAME on the Hub{folder}"
            ) from error
        raise ValueError(f"expected a model of this package, got {name!r} ({error}): see `timm-gac models`") from error
    check_storable(network)
    if recipe.init is not None and hasattr(network, "model_args") and not ann:
        args = network.model_args()
        for name in ("gate", "neuron"):
            if args[name] != getattr(recipe, name):
                _logger.warning("Kept %s %r, with which the initial weights were trained", name, args[name])
    if recipe.pack_spikes:
        if not hasattr(network, "set_spike_packing"):
            raise ValueError(f"expected a model that packs spikes, got {recipe.model!r}: give --no-pack-spikes")
        network.set_spike_packing(True)
    if recipe.current_noise:
        if not hasattr(network, "set_current_noise"):
            raise ValueError(f"expected a model with noise on currents, got {recipe.model!r}: give --current-noise 0")
        network.set_current_noise(recipe.current_noise)
    if hasattr(network, "set_int8_convs"):
        network.set_int8_convs(recipe.int8_convs)  # also where the initial weights were trained otherwise
    elif recipe.int8_convs:
        raise ValueError(f"expected a model that trains in 8 bits, got {recipe.model!r}: give --no-int8-convs")
    return network.to(memory_format=torch.channels_last) if recipe.channels_last else network


def prepare(accelerator: Accelerator, recipe: Recipe, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Model and optimiser as wrapped by accelerate, with several processes in DDP.

    With a CUDA graph there is no DDP: `TrainStep` averages the gradients, and this function shares the initial weights.
    """
    if recipe.cuda_graph and accelerator.num_processes > 1:
        share_tensors(model.state_dict().values())
        return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
    return accelerator.prepare(model, optimizer)


def describe_input(network: Any, shape: tuple[int, ...], whole: bool = False) -> None:
    """Write what the network is trained on into its ``pretrained_cfg``, which is stored with the model.

    If it has another number of channels, mean and std become those of the average channel.

    Args:
        network: Network whose ``pretrained_cfg`` is replaced.
        shape: (C, H, W) of the training images.
        whole: Whether test pictures are resized whole, without a crop.
    """
    cfg = dict(network.pretrained_cfg) | {"input_size": tuple(shape)}
    if whole:
        cfg |= {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
    if len(cfg["mean"]) != shape[0]:
        cfg |= {name: (sum(cfg[name]) / len(cfg[name]),) * shape[0] for name in ("mean", "std")}
    network.pretrained_cfg = cfg
