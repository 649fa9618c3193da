"""Nothing that users or files rely on is lost: `contract.json` was written from the first release's code.

Names, models and operators may be added. A function may gain arguments that have a default, an operator arguments at
the end that have one. Nothing else may differ.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import surface
from warm import WarmPython

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))
COMMANDS = (
    "demo",
    "convert",
    "quantize",
    "models",
    "train",
    "eval",
    "predict",
    "push",
    "verify",
    "energy",
    "inspect",
    "anytime",
    "bench kernels",
    "bench model",
)


def lost_arguments(old: str, new: str) -> list[str]:
    """What keeps a call written for the signature `old` from working on `new`, in words; empty where nothing does."""
    before, after = (ast.parse(f"def f{text}: pass").body[0].args for text in (old, new))
    positional = [list_arguments(each) for each in (before, after)]
    found = [f"position {i}: {a} became {b}" for i, (a, b) in enumerate(zip(*positional, strict=False)) if a != b]
    found += [f"{name} is gone" for name, _ in positional[0][len(positional[1]) :]]
    found += [f"{name} needs a value" for name, default in positional[1][len(positional[0]) :] if default is None]
    keywords = [list_keywords(each) for each in (before, after)]
    found += [f"{name} changed" for name, value in keywords[0].items() if keywords[1].get(name, "gone") != value]
    found += [f"{name} needs a value" for name in keywords[1].keys() - keywords[0].keys() if not keywords[1][name]]
    found += [f"{kind} changed" for kind in ("vararg", "kwarg") if getattr(before, kind) and not getattr(after, kind)]
    return found


def list_arguments(arguments: ast.arguments) -> list[tuple[str, str | None]]:
    """Name and default of each positional argument."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults = [ast.unparse(default) for default in arguments.defaults]
    return list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def list_keywords(arguments: ast.arguments) -> dict[str, str | None]:
    """Default of each argument that is passed by name only."""
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {argument.arg: default and ast.unparse(default) for argument, default in pairs}


@pytest.mark.parametrize(
    ("new", "lost"),
    [
        ("(x, n=1, *, flag=False)", []),
        ("(x, n=1, more=None, *, other=0, flag=False)", []),
        ("(x, n=2, *, flag=False)", ["position 1: ('n', '1') became ('n', '2')"]),
        ("(x, *, flag=False)", ["n is gone"]),
        ("(x, n=1)", ["flag changed"]),
        ("(x, n=1, *, flag=True)", ["flag changed"]),
        ("(x, n=1, *, must, flag=False)", ["must needs a value"]),
        ("(y, n=1, *, flag=False)", ["position 0: ('x', None) became ('y', None)"]),
    ],
)
def test_lost_arguments_are_found(new: str, lost: list[str]) -> None:
    assert lost_arguments("(x, n=1, *, flag=False)", new) == lost


@pytest.mark.parametrize("module_name", CONTRACT["names"])
def test_names_are_there(module_name: str) -> None:
    module, names = importlib.import_module(module_name), CONTRACT["names"][module_name]
    assert [name for name in names if not hasattr(module, name)] == []
    if hasattr(module, "__all__"):
        assert set(names) <= set(module.__all__)


@pytest.mark.parametrize("name", CONTRACT["calls"])
def test_calls_still_work(name: str) -> None:
    module_name, _, attribute = name.rpartition(".")
    new = surface.call_text(getattr(importlib.import_module(module_name), attribute))
    assert new is not None
    assert lost_arguments(CONTRACT["calls"][name], new) == [], f"{name} was {CONTRACT['calls'][name]}, is {new}"


@pytest.mark.parametrize("name", CONTRACT["operators"])
def test_operators_take_what_they_took(name: str) -> None:
    old, new = CONTRACT["operators"][name], surface.operators()[name]
    old_schema, new_schema = torch._C.parse_schema(old), torch._C.parse_schema(new)
    assert new_schema.is_backward_compatible_with(old_schema), f"{name} was {old}, is {new}"
    assert [str(result.type) for result in new_schema.returns] == [str(result.type) for result in old_schema.returns]


@pytest.mark.parametrize(
    ("new", "compatible"),
    [
        ("gac_kernels::op(Tensor x, int n, bool more=False) -> Tensor", True),
        ("gac_kernels::op(Tensor x, int n, bool more) -> Tensor", False),
        ("gac_kernels::op(Tensor x, bool more=False, int n=0) -> Tensor", False),
        ("gac_kernels::op(Tensor x, float n) -> Tensor", False),
        ("gac_kernels::op(Tensor x) -> Tensor", False),
    ],
)
def test_changed_operators_are_found(new: str, compatible: bool) -> None:
    old = torch._C.parse_schema("gac_kernels::op(Tensor x, int n) -> Tensor")
    assert torch._C.parse_schema(new).is_backward_compatible_with(old) == compatible


@pytest.mark.parametrize("name", CONTRACT["models"])
def test_models_keep_their_state_dict(name: str) -> None:
    expected, lines = CONTRACT["models"][name], surface.state_dict_lines(name)
    if "state_dict" in expected:  # says which tensor, where the digest cannot
        assert lines == expected["state_dict"]
    assert len(lines) == expected["tensors"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected["sha256"]
    tagged = timm.list_models(f"{name}*", module="spiking_resnet", pretrained=True, include_tags=True)
    assert set(expected["weights"]) <= set(tagged)


def left_out(path: Path) -> bool:
    """Whether a sparse checkout leaves a tracked file out, as CONTRIBUTING.md says how to."""
    listed = ["git", "-C", str(surface.ROOT), "ls-files", "-t", "--", str(path)]
    return subprocess.run(listed, capture_output=True, text=True).stdout.startswith("S ")


@pytest.mark.parametrize("name", CONTRACT["published"])
def test_published_files_are_what_they_were(name: str) -> None:
    folder = surface.ROOT / "hub" / "models" / name
    if left_out(folder / "config.json"):
        pytest.skip("this sparse checkout leaves the published weights out")
    for file, digest in CONTRACT["published"][name].items():
        if file == "config.json":
            assert surface.config_digest(folder / file) == digest, file
        else:
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file


def test_constants_are_what_they_were() -> None:
    constants = surface.constants()
    for name in ("CIFAR", "IMAGENET"):
        assert CONTRACT["constants"][name].items() <= constants[name].items()
    assert set(CONTRACT["constants"]["RECIPES"]) <= set(constants["RECIPES"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from timm_gac.cli import main

    with pytest.raises(SystemExit) as exited:
        main([*command.split(), "--help"])
    assert exited.value.code == 0
    assert f"usage: timm-gac {command}" in capsys.readouterr().out


def test_trainer_runs_as_a_module(warm_python: WarmPython) -> None:
    done = warm_python(["-m", "timm_gac.train", "--help"])
    assert done.returncode == 0, done.stderr
    assert "RECIPE" in done.stdout
