"""What --device means in every command."""

from __future__ import annotations

import dataclasses
import importlib
import typing

import pytest
import torch

from timm_gac.cli.main import COMMANDS
from timm_gac.runtime.device import device_type, resolve_device
from timm_gac.train.options import RunOptions


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_cuda_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_type("auto") == ("cuda" if there else "cpu")
    assert [device_type(name) for name in ("cpu", "cuda:1", "meta")] == ["cpu", "cuda", "meta"]


def test_every_command_that_takes_a_device_takes_cuda_where_there_is_one():
    defaults = {}
    for command, place in COMMANDS.items():
        module, _, function = place.partition(":")
        hints = typing.get_type_hints(getattr(importlib.import_module(f"timm_gac.cli.{module}"), function))
        for options in filter(dataclasses.is_dataclass, hints.values()):
            for field in dataclasses.fields(options):
                if field.name == "device":
                    defaults[command] = field.default
    defaults["train"] = RunOptions().device
    measuring = {"eval", "predict", "inspect", "energy", "anytime", "gate", "compare", "export"}
    assert measuring | {name for name in COMMANDS if name.startswith("bench")} | {"train"} == defaults.keys()
    assert set(defaults.values()) == {"auto"}


def test_a_device_of_this_machine():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "no_such_device"):
        with pytest.raises(ValueError, match=f"expected a device of this machine, got '{name}'"):
            resolve_device(name)
