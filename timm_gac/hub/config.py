"""config.json of a model folder: reading, checking and writing it."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, is_model_in_modules

from ..inference.quantize import SCHEMES
from ..models.ann_resnet import check_ann_args
from ..models.arguments import check_model_args
from ..models.build import MODULES
from ..runtime.files import parse_json, write_json

CONFIG = "config.json"
# What timm computes in, whatever type the weights are stored in.
COMPUTE_DTYPE = "float32"
# The largest config.json of timm's own is 40 KB (ImageNet-12k's label names); a larger one than this is not a config.
MAX_CONFIG_BYTES = 1 << 20
# Fields with which a config would make timm take its weights from elsewhere, or other weights than those stored.
ELSEWHERE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load", "label_offset")
MAX_IMAGE_SIZE = 4096
# Of a network in a folder. The largest here has 22 million weights, and 5 million values of one layer for T=6.
MAX_WEIGHTS = 1 << 27
MAX_VALUES = 1 << 25
# The newest format of model folders that this version writes and reads.
FORMAT = 1
LICENSE_KEYS = ("license_name", "license_link")

_DEFAULT_SIZE = [3, 224, 224]  # timm's
_SIZES = ("input_size", "test_input_size", "min_input_size")
_TEXTS = ("architecture", "tag", "source", "license", "description", "origin_url", "paper_name")
_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}
_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40


def short(value: Any) -> str:
    """A value for an error message, in at most 120 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def write_config(file: Path, config: dict[str, Any]) -> None:
    """Write a config.json that timm and transformers both load.

    timm >= 1.0.31 puts num_classes into ``model_args`` too, beside its place at the top level; transformers then
    refuses the folder ("multiple values for keyword argument 'num_classes'"), so it is left out there.

    transformers >= 5 computes in the type of the stored weights unless the config names another; timm always computes
    in float32. For weights stored as float16 their logits differed by up to 0.8, so ``dtype`` is named.
    """
    args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    head = {"architecture": config["architecture"], "dtype": COMPUTE_DTYPE}
    write_json(file, head | config | head | {"model_args": args})


def read_config(folder: Path) -> dict[str, Any]:
    """The checked config.json of a model folder.

    Raises:
        ValueError: There is none, it is over 1 MiB or no JSON object, or `check_config` refuses it.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"expected a model folder with {CONFIG}, got {str(folder)!r} without one: check the path")
    size = file.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"expected a {CONFIG} of at most {MAX_CONFIG_BYTES:,} bytes, got {size:,}: it is no config")
    try:
        config = parse_json(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(
            f"expected {CONFIG} as a JSON object, got {type(error).__name__} ({str(error)[:200]}): it is damaged"
        ) from error
    if isinstance(config, dict) and "architecture" not in config and (folder / "model" / CONFIG).is_file():
        raise ValueError(
            f"expected a model folder, got the run folder {str(folder)!r}: give the model in it, "
            f"{str(folder / 'model')!r}"
        )
    check_config(config)
    return config


def folder_format(config: dict[str, Any]) -> int:
    """The version of a model folder's format, derived from its config.json.

    Formats 0 and 1 have no number in the file, which timm and transformers read too: format 1 names the ``dtype``
    of the computation, format 0 (before release 0.1.0) does not. A later format will state its number as ``format``.

    Raises:
        ValueError: The format is newer than this version of the package.
    """
    version = config.get("format", int("dtype" in config))
    if type(version) is not int or version not in range(FORMAT + 1):
        raise ValueError(
            f"expected a model folder of format 0 to {FORMAT}, got {short(version)}: install a newer timm-gac"
        )
    return version


def license_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The licence that a config.json names: ``license``, and ``license_name`` and ``license_link`` where it is another.

    Args:
        config: Of a model folder.
    """
    named = {"license": config.get("pretrained_cfg", {}).get("license")}
    named |= {key: config.get(key) for key in LICENSE_KEYS}
    return {key: value for key, value in named.items() if value}


def check_config(config: Any) -> None:
    """Refuse a config.json that is not one of this package's models, or that reaches beyond its folder.

    Args:
        config: The parsed file.

    Raises:
        ValueError: The architecture is unknown, a field has the wrong type or is out of range, the network would be
            too large, or a field points to weights elsewhere.
    """
    if not isinstance(config, dict):
        raise ValueError(f"expected {CONFIG} as a JSON object, got {type(config).__name__}: it is no model's")
    folder_format(config)
    name = config.get("architecture")
    if not isinstance(name, str) or "." in name or not is_model_in_modules(name, MODULES):
        raise ValueError(
            f"expected an architecture of this package in {CONFIG}, got {short(name)}: see `timm-gac models`"
        )
    classes: Any = config.get("num_classes")
    args = config.get("model_args", {})
    check_model_args({"num_classes": classes})
    if not isinstance(args, dict):
        raise ValueError(f"expected model_args as an object, got {type(args).__name__}: {CONFIG} is malformed")
    check_args = check_ann_args if is_ann(name) else check_model_args
    check_args(args)
    if args.get("num_classes", classes) != classes:
        raise ValueError(
            f"expected one number of classes, got {classes} and, in model_args, {args['num_classes']}: correct {CONFIG}"
        )
    cfg = config.get("pretrained_cfg", {})
    _check_pretrained_cfg(cfg)
    for size in [cfg[key] for key in _SIZES if cfg.get(key)] or [_DEFAULT_SIZE]:
        check_size(complete_args(config, size[0]), size[1], size[2])
    _check_quantization(config.get("quantization"))
    for key in LICENSE_KEYS:
        _check_text(key, config.get(key))
    labels = config.get("label_names")
    if labels is not None:
        check_labels(labels, classes)


def is_ann(architecture: str) -> bool:
    """Whether the registered network of this name is an ANN (`ANNResNet`), without time steps."""
    return is_model_in_modules(architecture, ["ann_resnet"])


@lru_cache
def _own_args(architecture: str) -> dict[str, Any]:
    return timm.create_model(architecture, device="meta").model_args()


def complete_args(config: Mapping[str, Any], in_chans: int | None = None) -> dict[str, Any]:
    """All arguments of the network of a config.json, see ``model_args`` of its class.

    Args:
        config: The parsed file.
        in_chans: Channels of the input where ``model_args`` does not name them; those of ``input_size`` if not given.
    """
    size = config.get("pretrained_cfg", {}).get("input_size", _DEFAULT_SIZE)
    args = config.get("model_args", {}) | {"num_classes": config["num_classes"]}
    return _own_args(config["architecture"]) | {"in_chans": in_chans or size[0]} | args


def count_weights(args: Mapping[str, Any]) -> int:
    """Number of weights of the convolutions and the classifier of a network with these arguments."""
    width = args["stem_width"]
    count = args["in_chans"] * width * args["stem_kernel"] ** 2
    # An ANN has no encoder.
    count += 2 * 16 * width**2 if args.get("encoder") == "gac" and args["gate"] in ("full", "spatial") else 0
    for blocks, channels in zip(args["layers"], args["channels"], strict=False):
        if blocks:
            count += 9 * channels * (width + (2 * blocks - 1) * channels)
            width = channels
    return count + args["num_classes"] * width


def check_size(args: Mapping[str, Any], height: int, width: int) -> None:
    """Refuse a network that a small file would make reserve gigabytes.

    Args:
        args: All arguments of the network, see ``model_args`` of its class; without ``num_steps`` for one step.
        height: Of its images.
        width: Of its images.

    Raises:
        ValueError: It has too many weights, or the output of a layer has too many values over all time steps.
    """
    weights = count_weights(args)
    if weights > MAX_WEIGHTS:
        raise ValueError(f"expected a network of at most {MAX_WEIGHTS:,} weights, got {weights:,}: correct {CONFIG}")
    reduction = 2 if args["stem_kernel"] > 3 else 1
    values = args["in_chans"] * height * width
    stages = [(1, args["stem_width"], 1), *zip(args["layers"], args["channels"], args["strides"], strict=False)]
    for blocks, channels, stride in stages:
        if blocks:
            reduction *= stride
            values = max(values, channels * -(-height // reduction) * -(-width // reduction))
    steps = args.get("num_steps", 1)
    if steps * values > MAX_VALUES:
        raise ValueError(
            f"expected layers of at most {MAX_VALUES:,} values over all time steps, got {steps * values:,} for "
            f"num_steps={steps} and images of {height}x{width}: correct {CONFIG}"
        )


def _check_quantization(found: Any) -> None:
    if found is not None and (not isinstance(found, dict) or found.get("scheme") not in SCHEMES):
        scheme = found.get("scheme") if isinstance(found, dict) else found
        schemes = " or ".join(SCHEMES)
        raise ValueError(
            f"expected quantization with the scheme {schemes} in {CONFIG}, got {short(scheme)}: quantise anew"
        )


def _check_pretrained_cfg(cfg: Any) -> None:
    if not isinstance(cfg, dict):
        raise ValueError(f"expected pretrained_cfg as an object, got {type(cfg).__name__}: {CONFIG} is malformed")
    for key in cfg:
        if key not in _FIELDS:
            raise ValueError(f"expected timm's fields in pretrained_cfg, got {short(key)}: remove it from {CONFIG}")
    for key in ELSEWHERE:
        if cfg.get(key):
            raise ValueError(
                f"expected the weights beside {CONFIG}, got {key}={short(cfg[key])} in its pretrained_cfg, which leads "
                "elsewhere: remove that field"
            )
    for key in _TEXTS:
        _check_text(key, cfg.get(key))
    for key, choices in _CHOICES.items():
        if cfg.get(key, choices[0]) not in choices:
            raise ValueError(f"expected {key} among {', '.join(choices)}, got {short(cfg[key])}: correct {CONFIG}")
    for key in _SIZES:
        if key in cfg and not (key != "input_size" and cfg[key] is None):
            _check_input_size(key, cfg[key])
    crops = {key: cfg[key] for key in ("crop_pct", "test_crop_pct") if cfg.get(key) is not None}
    for key, value in crops.items():
        if not _is_number(value) or not 0.1 <= value <= 2:
            raise ValueError(f"expected {key} from 0.1 to 2, got {short(value)}: correct {CONFIG}")
    for key in ("mean", "std"):
        _check_channels(key, cfg.get(key, [0.5]))
    classes = cfg.get("num_classes", 0)
    if type(classes) is not int:
        raise ValueError(
            f"expected num_classes of pretrained_cfg as an integer, got {short(classes)}: correct {CONFIG}"
        )


def _check_text(key: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and len(value) <= 1000 and value.isprintable()):
        raise ValueError(f"expected {key} as a printable text in {CONFIG}, got {short(value)}: correct it")


def _check_input_size(key: str, size: Any) -> None:
    numbers = isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size)
    if not numbers or not all(1 <= n <= MAX_IMAGE_SIZE for n in size):
        raise ValueError(f"expected {key} as [C, H, W] from 1 to {MAX_IMAGE_SIZE}, got {short(size)}: correct {CONFIG}")


def _check_channels(key: str, values: Any) -> None:
    numbers = isinstance(values, list) and 1 <= len(values) <= MAX_IMAGE_SIZE and all(map(_is_number, values))
    if not numbers or (key == "std" and not all(value > 0 for value in values)):
        kind = "positive numbers" if key == "std" else "numbers"
        raise ValueError(f"expected {key} as {kind}, one a channel, got {short(values)}: correct {CONFIG}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6 and math.isfinite(value)


def check_labels(labels: Any, num_classes: int) -> list[str]:
    """The label names, one printable text for each class.

    Raises:
        ValueError: They are no list of texts, a text cannot be printed, or their number is another.
    """
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) and label for label in labels):
        raise ValueError(f"expected label names as a list of texts, got {short(labels)}: give one a class")
    if odd := next((label for label in labels if not label.isprintable()), None):
        raise ValueError(f"expected label names of printable characters, got {short(odd)}: correct it")
    if len(labels) != num_classes:
        raise ValueError(f"expected {num_classes} label names, one a class, got {len(labels)}: give them in order")
    return list(labels)
