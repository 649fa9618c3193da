"""Model folders: config.json and model.safetensors, as timm, transformers and the Model Hub take them."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import is_model_in_modules, save_for_hf
from torch import nn

from ..inference.integer import IntegerSpikingResNet
from ..inference.quantize import quantize, quantize_as
from ..models.ann_resnet import ANNResNet
from ..models.build import MODULES
from ..models.checkpoint import pack_int8_convs
from ..models.network import SpikingResNet
from ..models.weights import TRAINED_ON
from ..runtime.files import check_new_folder, scratch_folder
from ..runtime.finite import check_finite
from .config import (
    CONFIG,
    LICENSE_KEYS,
    MAX_CONFIG_BYTES,
    check_config,
    complete_args,
    count_weights,
    license_of,
    read_config,
    write_config,
)

WEIGHTS = "model.safetensors"
_logger = logging.getLogger(__name__)


def save_model_folder(
    model: nn.Module,
    out: Path,
    model_args: dict[str, Any] | None = None,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> Path:
    """Write the two files from which ``timm.create_model('local-dir:OUT')`` rebuilds a model.

    A network that trains in 8 bits (`SpikingResNet.set_int8_convs`) is stored as the integers and scales that it
    computes with, which loading multiplies without rounding. The learning weights between them are not kept.

    ``config.json`` and ``model.safetensors`` are written beside the folder first and moved into it whole; other files
    in it are left alone. All constructor arguments that differ from the registered architecture's are stored.

    Args:
        model: A model made by ``timm.create_model``, or what `timm_gac.quantize` made of one: ``config.json`` then
            names the scheme, and `load_model` alone loads it: timm knows no integer networks.
        out: Folder to write to; created if missing.
        model_args: Arguments to store beside the model's own.
        license: Licence of the weights, as the Hub spells it; the one that the model was loaded with where left out.
        license_name: Name of the licence, where ``license`` is ``other``.
        license_link: Address of its text.

    Returns:
        The folder.

    Raises:
        ValueError: The model cannot be rebuilt from a folder (it was folded, changed, or not made by timm), or holds
            values that are not finite; or ``out`` is a file, or ``model_args`` no dict.
        OSError: The folder cannot be written, such as on a full disk; files in it are as they were.
    """
    if not isinstance(model_args, dict | None):
        raise ValueError(f"expected model_args as a dict, got {model_args!r}: give names and values")
    out = Path(out)
    if any(path.is_file() for path in (out, *out.parents)):
        raise ValueError(f"expected a folder for the model, got {str(out)!r}, a file or below one: choose another")
    args = _rebuilding_args(model) | (model_args or {})
    check_finite(model, "to save")
    named: dict[str, Any] = dict(license=license, license_name=license_name, license_link=license_link)
    if license is None:  # of a model that came from a folder
        named = getattr(model, "license", {}) | {key: value for key, value in named.items() if value}
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out) as scratch:
        try:
            save_for_hf(model, scratch, model_args=args, safe_serialization=True)
            if int8_weights := pack_int8_convs(model):
                save_file(int8_weights, scratch / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # as for a full disk, where Python itself raises OSError
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(
                int(number[1]) if number else errno.EIO, f"model folder {out} not written ({error}): free some space"
            ) from error
        config_file = scratch / CONFIG
        config = json.loads(config_file.read_text(encoding="utf-8")) | {"model_args": args}
        if named.get("license"):
            config["pretrained_cfg"]["license"] = named["license"]
        config |= {key: named[key] for key in LICENSE_KEYS if named.get(key)}  # timm's own config has no such fields
        scheme = getattr(model, "quantization", None)
        write_config(config_file, config | ({"quantization": scheme} if scheme else {}))
        check_config(json.loads(config_file.read_bytes()))
        # safetensors makes files that their owner alone can read.
        (scratch / WEIGHTS).chmod(config_file.stat().st_mode)
        out.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            (scratch / name).replace(out / name)
    return out


def check_storable(model: Any) -> None:
    """Raise unless `save_model_folder` can store a network. Worth a call before an hour of training.

    Raises:
        ValueError: It was not made by ``timm.create_model`` as one of this package's, or was changed since.
    """
    _rebuilding_args(model)
    name = str(model.pretrained_cfg["architecture"])
    if not is_model_in_modules(name, MODULES):
        raise ValueError(f"expected a model of this package, got {name!r}: see `timm-gac models`")


def check_storable_config(model: Any, label_names: Sequence[str] = ()) -> None:
    """Raise where `save_model_folder` or `load_model` would refuse a network's config.json.

    Worth a call before an hour of training too, once the network's ``pretrained_cfg`` says what it is trained on.

    Args:
        model: The network.
        label_names: Names of its classes, which its config.json will have; empty where unknown.

    Raises:
        ValueError: It would be refused, as for a name that cannot be printed, or for images that are too large.
    """
    cfg = model.pretrained_cfg
    config = {
        "architecture": cfg["architecture"],
        "num_classes": model.num_classes,
        "model_args": _rebuilding_args(model),
        "pretrained_cfg": {"input_size": cfg["input_size"]},
        **({"label_names": label_names} if label_names else {}),
    }
    content = json.dumps(config, indent=2)
    if len(content) > MAX_CONFIG_BYTES - 2**14:  # timm adds 2 KB
        raise ValueError(
            f"expected names of classes that fit into a {CONFIG} of {MAX_CONFIG_BYTES:,} bytes, got {len(content):,} "
            f"bytes with {len(label_names):,} names: shorten them"
        )
    try:
        check_config(json.loads(content))
    except ValueError as error:
        raise ValueError(f"{error} (so the network could not be stored in the end)") from error


def _rebuilding_args(model: nn.Module) -> dict[str, Any]:
    """The arguments with which timm rebuilds a network, but its number of classes.

    Raises:
        ValueError: What they rebuild has other tensors.
    """
    if not isinstance(model, (SpikingResNet, ANNResNet)) or not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"expected a network made by timm.create_model, of this package, got {type(model).__name__}: make it so "
            "(`timm-gac models` lists them)"
        )
    args: dict[str, Any] = model.changed_args()
    if isinstance(model, SpikingResNet):
        args = {"num_steps": model.num_steps} | args
    if not isinstance(model, IntegerSpikingResNet):
        rebuilt = timm.create_model(model.pretrained_cfg["architecture"], device="meta", **args)
        expected = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
        found = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if expected != found:
            first = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ValueError(
                f"expected a network as timm.create_model builds it, got one with another {first!r}: save it from "
                "before it was folded or its layers were replaced"
            )
    return {name: value for name, value in args.items() if name != "num_classes"}


def refuse_run_folder(out: Path, content: str, option: str = "folder") -> None:
    """Refuse to write a model into the folder of a run, beside its ``checkpoints/`` and ``model/``.

    Args:
        out: Where the model will be written.
        content: What it will hold, for the error message.
        option: What the user is to choose anew.

    Raises:
        ValueError: It is a run folder.
    """
    if (out / "checkpoints").is_dir() or (out / "model" / CONFIG).is_file():
        raise ValueError(
            f"expected a folder of its own for {content}, got the run folder {str(out)!r}, whose config.json would be "
            f"lost: choose another {option}"
        )


def save_quantized(
    model: nn.Module, out: Path, clip: str = "mse", overwrite: bool = False, exact_sums: bool = False
) -> Path:
    """Quantise a network (`timm_gac.quantize`) into a model folder.

    Args:
        model: A float network.
        out: Folder to write to.
        clip: As for `timm_gac.quantize`.
        overwrite: Replace the model in a folder that is not empty.
        exact_sums: As for `timm_gac.quantize`.

    Returns:
        The folder, for `load_model`.

    Raises:
        ValueError: The network cannot be quantised, or the folder is a file, a run folder or not empty.
    """
    out = Path(out)
    check_new_folder(out, overwrite)
    refuse_run_folder(out, "the model")
    return save_model_folder(quantize(model, clip, exact_sums), out)


def load_model(folder: Path) -> nn.Module:
    """The model of a model folder, in float32 on the CPU and in eval mode; an integer network where it is quantised.

    A licence other than an open one of the Hub's list (``license: other``) is named in the log.

    Raises:
        ValueError: The folder is no model folder, or its weights are damaged, do not fit its config or are not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"expected {WEIGHTS} in {str(folder)!r}, got none: only safetensors are read, no pickles")
    try:
        weights, size = count_weights(complete_args(config)), file.stat().st_size
        if weights > size:  # each takes a byte at least
            raise ValueError(f"{size:,} bytes for {weights:,} weights")
        network: Any
        if "quantization" in config:
            scheme = config["quantization"]["scheme"]
            network = quantize_as(scheme, timm.create_model(f"local-dir:{folder}", pretrained=False), clip="max")
            network.load_state_dict(load_file(file))
            network.check_grid()
            network.quantization = config["quantization"]
        else:
            network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (SafetensorError, RuntimeError, LookupError, OSError, AttributeError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(
            f"expected the weights of {config['architecture']} in {str(file)!r}, got others or a damaged file "
            f"({detail}): download or convert it again"
        ) from error
    check_finite(network, f"in {str(file)!r}")
    named = license_of(config)
    network.license = named
    if named.get("license") == "other" and config["pretrained_cfg"].get("tag") not in TRAINED_ON:  # those say it
        terms = ", ".join(named[key] for key in LICENSE_KEYS if key in named) or "see its card"
        _logger.warning("the weights in %s have a licence of their own: %s", folder.name, terms)
    return network
