"""``--plugin``: files and modules of the user's own that commands and ``python -m`` of this package import first."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

OPTION = "--plugin"
HELP = (
    f"{OPTION} my_neuron.py, with any command, first imports a Python file or a module of yours: the command then "
    "knows the neurons and surrogates that it registers."
)


def take_plugins(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The plugins named among arguments, and the other arguments.

    Raises:
        ValueError: Nothing follows the option.
    """
    plugins, others = list[str](), list[str]()
    arguments = iter(given)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            others.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value or value.startswith("-"):
            raise ValueError(f"expected a file or a module after {OPTION}, got {value or 'nothing'}: name one")
        plugins.append(value)
    return plugins, others


def import_plugin(name: str) -> None:
    """Import a file by its path, or a module by its name, from the folder that one is in or from where Python looks.

    A file that has been imported already is not imported again. What the module itself raises is left as it is.

    Raises:
        ValueError: There is no such file or module.
    """
    path = Path(name)
    remedy = "give the path of a file, such as my_neuron.py, or the name of a module"
    if path.suffix != ".py" and os.sep not in name:
        _look_in(Path.cwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # of what the module imports
            raise ValueError(f"expected a module for {OPTION}, got {name!r}: {remedy}") from None
        return
    if not path.is_file():
        raise ValueError(f"expected a Python file for {OPTION}, got {name!r}, which is none: {remedy}")
    if str(path.resolve()) in [getattr(module, "__file__", None) for module in list(sys.modules.values())]:
        return
    _look_in(path.parent.resolve())
    module = path.stem if path.stem not in sys.modules else f"timm_gac_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module, path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file for {OPTION}, got {name!r}: {remedy}")
    sys.modules[module] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)


def _look_in(folder: Path) -> None:
    """Let Python find modules in a folder, as it does for a script that lies there."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
