"""Arguments of a spiking ResNet as plain values, such as a config.json holds, and the values allowed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from gac_kernels import LIFSpec
from gac_kernels.registry import neuron_names

from ..layers.encoder import GATES
from ..layers.learned import NEURONS
from .blocks import MSBlock, SpikingBlock

BLOCKS: dict[str, type[MSBlock] | type[SpikingBlock]] = {"MSBlock": MSBlock, "SpikingBlock": SpikingBlock}
_BLOCK_ARGS = ("stride", "num_steps", "spec", "drop_path", "device", "dtype")
ENCODERS = ("gac", "direct")
POOLS = ("", *(prefix + pool for prefix in ("", "fast") for pool in ("avg", "max", "avgmax", "catavgmax")))
MAX_CLASSES = 1_000_000
# Wide enough for every network of use, and narrow enough that no number reserves a large memory by mistake.
_INTEGERS = {
    "num_steps": (1, 1024),
    "num_classes": (0, MAX_CLASSES),
    "in_chans": (1, 4096),
    "stem_width": (1, 4096),
    "stem_kernel": (1, 31),
}
_RATES = ("drop_rate", "drop_path_rate")
_SEQUENCES = {"layers": (0, 256), "channels": (1, 8192), "strides": (1, 8)}
_CHOICES = {
    "encoder": ENCODERS,
    "gate": tuple(GATES),
    "neuron": tuple(NEURONS),
    "global_pool": POOLS,
    "scaled_init": (False, True),
    "int8_convs": (False, True),
}
_NAMES = (*_INTEGERS, *_RATES, *_SEQUENCES, *_CHOICES, "block", "spec")
# Those that an ANN of the same shape does not have.
SPIKING_ARGS = ("num_steps", "encoder", "gate", "neuron", "spec", "block", "scaled_init", "int8_convs")
# Weights of a classifier: 1 GiB in float32.
MAX_CLASSIFIER = 2**28


def check_model_args(args: Mapping[str, Any]) -> None:
    """Check arguments of `SpikingResNet`, whatever their source; what is not named has its default.

    Args:
        args: By name; ``block`` and ``spec`` also in the plain form that `SpikingResNet.model_args` gives them.

    Raises:
        ValueError: A name is unknown, or a value has another type or is out of range.
    """
    for name, value in args.items():
        if name in _INTEGERS:
            _check_integer(name, value, *_INTEGERS[name])
        elif name in _RATES:
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {_short(value)}: give one such as 0.1")
        elif name in _SEQUENCES:
            _check_sequence(name, value)
        elif name in _CHOICES:
            allowed = (*_CHOICES[name], *neuron_names()[1:]) if name == "neuron" else _CHOICES[name]
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                choices = " or ".join(repr(choice) for choice in allowed)
                remedy = ", or import the module that registers it (--plugin of a command)" * (name == "neuron")
                raise ValueError(f"expected {name} {choices}, got {_short(value)}: choose one of these{remedy}")
        elif name == "block":
            block_class(value)
        elif name == "spec":
            lif_spec(value)
        else:
            raise ValueError(f"expected arguments among {', '.join(_NAMES)}, got {_short(name)}: remove it")
    if args.get("encoder") == "direct" and args.get("gate", "full") != "full":
        raise ValueError(
            f"expected encoder 'gac' for gate {args['gate']!r}, got 'direct': it has no gate, leave it out"
        )
    classes, channels = args.get("num_classes", 0), args.get("channels", (0,))
    if channels and classes * channels[-1] > MAX_CLASSIFIER:
        raise ValueError(
            f"expected num_classes * channels[-1] of at most {MAX_CLASSIFIER:,}, got {classes:,} * {channels[-1]:,}: "
            "give fewer classes"
        )


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ValueError(
            f"expected {name} as an integer from {low:,} to {high:,}, got {_short(value)}: give one in this range"
        )


def _check_sequence(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not 3 <= len(value) <= 4:
        raise ValueError(f"expected {name} with one integer for each of 3 or 4 stages, got {_short(value)}: give these")
    for index, entry in enumerate(value):
        _check_integer(f"{name}[{index}]", entry, *_SEQUENCES[name])


def block_class(block: Any) -> Any:
    """A class of blocks, from itself, which may be one's own, or from its name.

    Raises:
        ValueError: It is neither, or a class without the arguments that a block gets.
    """
    if isinstance(block, type) and issubclass(block, nn.Module):
        try:
            inspect.signature(block).bind(1, 1, **dict.fromkeys(_BLOCK_ARGS))
        except TypeError as error:
            raise ValueError(
                f"expected block as a class that takes in_chs, out_chs, {', '.join(_BLOCK_ARGS)}, "
                f"got {_short(block)} ({error}): give it these"
            ) from None
        return block
    if not isinstance(block, str) or block not in BLOCKS:
        raise ValueError(f"expected block {' or '.join(BLOCKS)}, got {_short(block)}: choose one of these")
    return BLOCKS[block]


def lif_spec(spec: Any) -> LIFSpec:
    """A `LIFSpec`, from itself or a mapping of all of its fields.

    Raises:
        ValueError: It is neither, or a field has another type or is out of range.
    """
    if isinstance(spec, LIFSpec):
        return spec
    fields = {field.name: type(field.default) for field in dataclasses.fields(LIFSpec)}
    if isinstance(spec, Mapping) and "neuron" not in spec:
        del fields["neuron"]  # an argument of the network says it
    if not isinstance(spec, Mapping) or spec.keys() != fields.keys():
        raise ValueError(
            f"expected spec as a LIFSpec or its fields {', '.join(fields)}, got {_short(spec)}: give these"
        )
    for name, kind in fields.items():
        value = spec[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is float and not math.isfinite(value)):
            raise ValueError(f"expected {name} of spec as {kind.__name__}, got {_short(value)}: correct it")
    return LIFSpec(**spec)


def with_neuron(spec: LIFSpec, neuron: str) -> tuple[LIFSpec, str]:
    """The spec of a network's neurons, and the name of these, from both as they were given.

    Raises:
        ValueError: They name two different neurons, or one that does not learn is to.
    """
    if neuron not in NEURONS:
        if spec.neuron not in ("lif", neuron):
            raise ValueError(
                f"expected one neuron, got {neuron!r} and a spec with {spec.neuron!r}: leave one of the two out"
            )
        return dataclasses.replace(spec, neuron=neuron), neuron
    if NEURONS[neuron] is not None:
        spec.refuse_others("learned decay and threshold")
    return spec, neuron if spec.is_lif else spec.neuron


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
