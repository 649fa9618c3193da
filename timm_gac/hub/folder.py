"""Model folders: config.json and model.safetensors, as timm, transformers and the Model Hub take them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import is_model_in_modules, save_for_hf
from torch import nn

from ..inference.quantize import SCHEME, quantize
from ..runtime.files import write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# What timm computes in, whatever type the weights are stored in.
COMPUTE_DTYPE = "float32"
# The largest config.json of timm's own is 40 KB (ImageNet-12k's label names); a larger one than this is not a config.
MAX_CONFIG_BYTES = 1 << 20
# What a config.json may say of the architecture, and the values allowed: enough for every model here, and too little
# to make a small file reserve a large memory.
MODEL_ARGS: dict[str, tuple[type, float, float]] = {
    "num_steps": (int, 1, 1024),
    "in_chans": (int, 1, 4096),
    "num_classes": (int, 0, 1_000_000),
    "drop_rate": (float, 0, 1),
    "drop_path_rate": (float, 0, 1),
}
POOLS = ("", "avg", "max", "avgmax", "catavgmax")
# Fields with which a config would make timm take its weights from elsewhere than from beside it.
ELSEWHERE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")
MAX_IMAGE_SIZE = 4096
# The newest format of model folders that this version writes and reads.
FORMAT = 1


def save_model_folder(model: nn.Module, out: Path, model_args: dict[str, Any] | None = None) -> Path:
    """Write the two files from which ``timm.create_model('local-dir:OUT')`` rebuilds a model.

    ``config.json`` and ``model.safetensors`` are written beside the folder first and moved into it whole; other files
    in it are left alone.

    Args:
        model: A model made by ``timm.create_model``, or what `timm_gac.quantize` made of one: ``config.json`` then
            names the scheme, and `load_model` alone loads it: timm knows no integer networks.
        out: Folder to write to; created if missing.
        model_args: Further arguments that the architecture needs to be rebuilt; ``num_steps``, and ``in_chans``
            where it is not 3, are added.

    Returns:
        The folder.
    """
    args = {"num_steps": model.num_steps, **(model_args or {})}
    if model.in_chans != 3:
        args.setdefault("in_chans", model.in_chans)
    out.parent.mkdir(parents=True, exist_ok=True)
    scheme = getattr(model, "quantization", None)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        save_for_hf(model, scratch, model_args=args, safe_serialization=True)
        config_file = Path(scratch, CONFIG)
        config = json.loads(config_file.read_text()) | {"model_args": args}
        write_config(config_file, config | ({"quantization": scheme} if scheme else {}))
        out.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            Path(scratch, name).replace(out / name)
    return out


def save_quantized(model: nn.Module, out: Path, clip: str = "mse", overwrite: bool = False) -> Path:
    """Quantise a network (`timm_gac.quantize`) into a model folder.

    Args:
        model: A float network.
        out: Folder to write to.
        clip: As for `timm_gac.quantize`.
        overwrite: Replace the model in a folder that is not empty.

    Returns:
        The folder, for `load_model`.

    Raises:
        ValueError: The network cannot be quantised, or the folder is a file or is not empty.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder to write to, got the file {str(out)!r}: choose another name")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"expected a new or empty folder, got {str(out)!r}: choose another or allow overwriting")
    return save_model_folder(quantize(model, clip), out)


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
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(
            f"expected {CONFIG} as a JSON object, got {type(error).__name__} ({error}): it is damaged"
        ) from error
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
    if version not in range(FORMAT + 1):
        raise ValueError(f"expected a model folder of format 0 to {FORMAT}, got {version!r}: install a newer timm-gac")
    return version


def check_config(config: Any) -> None:
    """Refuse a config.json that is not one of this package's models, or that reaches beyond its folder.

    Args:
        config: The parsed file.

    Raises:
        ValueError: The architecture is unknown, a field has the wrong type or is out of range, or a field points to
            weights elsewhere.
    """
    if not isinstance(config, dict):
        raise ValueError(f"expected {CONFIG} as a JSON object, got {type(config).__name__}: it is no model's")
    folder_format(config)
    name = config.get("architecture")
    if not isinstance(name, str) or not is_model_in_modules(name, ["spiking_resnet"]):
        raise ValueError(
            f"expected an architecture of this package in {CONFIG}, got {name!r}: see `timm-gac models` for the list"
        )
    _check_number("num_classes", config.get("num_classes"))
    args = config.get("model_args", {})
    if not isinstance(args, dict):
        raise ValueError(f"expected model_args as an object, got {type(args).__name__}: {CONFIG} is malformed")
    for key, value in args.items():
        if key == "global_pool" and value in POOLS:
            continue
        _check_number(key, value)
    if args.get("num_classes", config["num_classes"]) != config["num_classes"]:
        raise ValueError(
            f"expected one number of classes, got {config['num_classes']} and, in model_args, {args['num_classes']}: "
            f"correct {CONFIG}"
        )
    _check_pretrained_cfg(config.get("pretrained_cfg", {}))
    _check_quantization(config.get("quantization"))
    labels = config.get("label_names")
    if labels is not None:
        check_labels(labels, config["num_classes"])


def _check_number(key: str, value: Any) -> None:
    if key not in MODEL_ARGS:
        raise ValueError(f"expected model_args among {', '.join(MODEL_ARGS)}, global_pool, got {key!r}: remove it")
    kind, low, high = MODEL_ARGS[key]
    if type(value) not in (kind, int) or not low <= value <= high:
        raise ValueError(f"expected {key} from {low:,} to {high:,} in {CONFIG}, got {value!r}: correct it")


def _check_quantization(found: Any) -> None:
    if found is not None and (not isinstance(found, dict) or found.get("scheme") != SCHEME):
        scheme = found.get("scheme") if isinstance(found, dict) else found
        raise ValueError(f"expected quantization with the scheme {SCHEME!r} in {CONFIG}, got {scheme!r}: quantise anew")


def _check_pretrained_cfg(cfg: Any) -> None:
    if not isinstance(cfg, dict):
        raise ValueError(f"expected pretrained_cfg as an object, got {type(cfg).__name__}: {CONFIG} is malformed")
    for key in ELSEWHERE:
        if cfg.get(key):
            raise ValueError(
                f"expected the weights beside {CONFIG}, got {key}={cfg[key]!r} in its pretrained_cfg, which leads "
                "elsewhere: remove that field"
            )
    size = cfg.get("input_size", [3, 32, 32])
    numbers = isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size)
    if not numbers or not all(1 <= n <= MAX_IMAGE_SIZE for n in size):
        raise ValueError(f"expected input_size as [C, H, W] from 1 to {MAX_IMAGE_SIZE}, got {size!r}: correct {CONFIG}")


def check_labels(labels: Any, num_classes: int) -> list[str]:
    """The label names, where they are one text a class.

    Raises:
        ValueError: They are not.
    """
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) and label for label in labels):
        raise ValueError(f"expected label names as a list of texts, got {str(labels)[:80]!r}: give one a class")
    if len(labels) != num_classes:
        raise ValueError(f"expected {num_classes} label names, one a class, got {len(labels)}: give them in order")
    return list(labels)


def load_model(folder: Path) -> nn.Module:
    """The model of a model folder, in float32 on the CPU and in eval mode; an integer network where it is quantised.

    Raises:
        ValueError: The folder is no model folder, or its weights are damaged or do not fit its config.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"expected {WEIGHTS} beside {CONFIG}, got none in {str(folder)!r}: only safetensors are read, no pickles"
        )
    try:
        if "quantization" not in config:
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        network = quantize(timm.create_model(f"local-dir:{folder}", pretrained=False), clip="max")
        network.load_state_dict(load_file(folder / WEIGHTS))
        network.check_grid()
        network.quantization = config["quantization"]
        return network
    except (SafetensorError, RuntimeError, KeyError, OSError, AttributeError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(
            f"expected the weights of {config['architecture']} in {str(folder / WEIGHTS)!r}, got others or a damaged "
            f"file ({detail}): download or convert it again"
        ) from error
