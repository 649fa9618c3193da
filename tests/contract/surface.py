"""What users and files of this package rely on, read from the running code: names, operators, models, published files.

``python tests/contract/surface.py`` prints it as JSON. `contract.json` is that output for the first release; it is
not written anew when a test of it fails, only when an addition is to be promised too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from gac_kernels import CIFAR, IMAGENET
from timm_gac.train import RECIPES

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "timm_gac",
    "timm_gac.data",
    "timm_gac.energy",
    "timm_gac.hub",
    "timm_gac.models",
    "timm_gac.train",
    "gac_kernels",
    "gac_kernels.backend",
    "gac_kernels.layers",
    "gac_kernels.reference",
    "gac_kernels.spec",
    "gac_kernels.tuning",
)
# The names of these packages are called with the arguments listed.
CALLED = ("timm_gac", "gac_kernels")
# Models whose whole state dict is listed; the others have its digest.
LISTED = ("gac_msresnet18_cifar", "test_gac_msresnet")
NEW_CONFIG_KEYS = ("dtype",)


def public_names(module_name: str) -> list[str]:
    """The names in ``__all__``, or else those that the module defines itself."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sorted(name for name in names if not name.startswith("_"))


def call_text(value: Any) -> str | None:
    """What a function or class is called with, without annotations: ``(x, spec=CIFAR)``; None for other values."""
    if not callable(value):
        return None
    signature = inspect.signature(value)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare)).replace(repr(CIFAR), "CIFAR")


def calls() -> dict[str, str]:
    """`call_text` of everything callable in the packages of `CALLED`, by full name."""
    found = {}
    for module_name in CALLED:
        module = importlib.import_module(module_name)
        for name in public_names(module_name):
            text = call_text(getattr(module, name))
            if text is not None:
                found[f"{module_name}.{name}"] = text
    return found


def operators() -> dict[str, str]:
    """The schema of every operator in torch.ops.gac_kernels."""
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gac_kernels::")]
    return {schema.name: str(schema) for schema in sorted(schemas, key=lambda schema: schema.name)}


def state_dict_lines(name: str) -> list[str]:
    """``name shape dtype`` of every tensor of a model at 4 time steps, in order, on which optimiser states depend."""
    model = timm.create_model(name, num_steps=4, device=torch.device("meta"))
    return [f"{key} {list(tensor.shape)} {tensor.dtype}" for key, tensor in model.state_dict().items()]


def models() -> dict[str, dict[str, Any]]:
    """Number of tensors and digest of the state dict of every registered model, and the tags of its weights."""
    tagged = timm.list_models(module="spiking_resnet", pretrained=True, include_tags=True)
    found = {}
    for name in timm.list_models(module="spiking_resnet"):
        lines = state_dict_lines(name)
        found[name] = {
            "tensors": len(lines),
            "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "weights": sorted(tag for tag in tagged if tag.partition(".")[0] == name),
        }
        if name in LISTED:
            found[name]["state_dict"] = lines
    return found


def config_digest(file: Path) -> str:
    """Digest of a config.json without the keys that were added to the format since."""
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in NEW_CONFIG_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def published() -> dict[str, dict[str, str]]:
    """Digests of the configuration, weights and golden tensors of every published model folder."""
    found: dict[str, dict[str, str]] = {}
    for folder in sorted(path for path in (ROOT / "hub" / "models").iterdir() if path.is_dir()):
        found[folder.name] = {"config.json": config_digest(folder / "config.json")}
        for name in ("model.safetensors", "golden.safetensors"):
            found[folder.name][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found


def constants() -> dict[str, Any]:
    """The fields of both papers' neurons, and the recipes' names."""
    return {"CIFAR": asdict(CIFAR), "IMAGENET": asdict(IMAGENET), "RECIPES": sorted(RECIPES)}


def surface() -> dict[str, Any]:
    """All of the above."""
    return {
        "names": {module: public_names(module) for module in MODULES},
        "calls": calls(),
        "operators": operators(),
        "models": models(),
        "published": published(),
        "constants": constants(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(surface(), indent=1) + "\n")
