"""The trainer's command line: ``RECIPE [--field value]...`` for every field of a recipe and of a run."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import RunOptions
from .recipes import RECIPES, Recipe

__all__ = ["parse"]


def parse(arguments: Sequence[str] | None = None, program: str | None = None) -> tuple[Recipe, RunOptions]:
    """Recipe and options of a command line.

    Args:
        arguments: Without the program's name; of the process where None.
        program: Name shown in the help.

    Raises:
        ValueError: A value is out of range.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train a spiking network. The first argument names a recipe; any of its fields can be overridden.",
        epilog="Several GPUs: accelerate launch -m timm_gac.train RECIPE ... Stop at any time (Ctrl-C saves); go on "
        "with the same command and --resume.",
    )
    parser.add_argument("recipe_name", metavar="RECIPE", choices=sorted(RECIPES), help=", ".join(sorted(RECIPES)))
    for title, kind in (("run", RunOptions), ("recipe", Recipe)):
        group = parser.add_argument_group(title)
        descriptions = _descriptions(kind)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name != "recipe_name":
                shown = None if kind is Recipe else field.default
                _add(group, field.name, hints[field.name], descriptions.get(field.name, ""), shown)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    name = given["recipe_name"]
    recipe = dataclasses.replace(RECIPES[name], **_of(Recipe, given))
    return recipe, dataclasses.replace(RunOptions(), **_of(RunOptions, given))


def _of(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in names}


def _add(group: Any, name: str, hint: Any, text: str, default: Any) -> None:
    option = "--" + name.replace("_", "-")
    text = text.replace("%", "%%") + ("" if default in (None, "", ()) else f" (default: {default})")
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] or [hint]
    if hint is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif typing.get_origin(hint) is tuple:
        group.add_argument(option, nargs="+", type=str, default=None, metavar="NAME", help=text)
    else:
        kind = kinds[0] if isinstance(kinds[0], type) else str
        metavar = {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")
        group.add_argument(option, type=kind, default=None, metavar=metavar, help=text)


def _descriptions(kind: type) -> dict[str, str]:
    """First sentence for each argument in a class's docstring."""
    texts: dict[str, str] = {}
    lines = (kind.__doc__ or "").partition("Args:")[2].partition("Raises:")[0].splitlines()
    name = ""
    for line in lines:
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and ":" in line:
            name, _, text = line.strip().partition(":")
            texts[name] = text.strip()
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return {key: text.replace("``", "").rstrip(".") for key, text in texts.items()}
