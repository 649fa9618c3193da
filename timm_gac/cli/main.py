"""``timm-gac``: which commands there are, and how errors are shown.

The modules of the commands hold their options and import PyTorch, timm and what else they need only when they run, so
that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.extras import SubcommandApp

from ..runtime.arguments import refuse_empty
from ..runtime.plugins import HELP, import_plugin, take_plugins
from .output import nearest

# Command to its module and function here, in the order of the list that `timm-gac --help` shows.
COMMANDS = {
    "demo": "demo:demo",
    "models": "models:models",
    "data": "data:data",
    "train": "train:train",
    "eval": "evaluate:evaluate",
    "predict": "predict:predict",
    "inspect": "inspect:inspect",
    "energy": "energy:energy",
    "anytime": "anytime:anytime",
    "gate": "gate:gate",
    "compare": "compare:compare",
    "gain": "gain:gain",
    "convert": "hub:convert",
    "quantize": "quantize:quantize",
    "export": "export:export",
    "push": "hub:push",
    "verify": "hub:verify",
    "bench kernels": "bench:kernels",
    "bench model": "bench:model",
    "bench loops": "bench:loops",
    "bench scaling": "bench:scaling",
    "bench curves": "bench:curves",
}
# What PyPI calls a package whose module has another name.
PYPI = {"sklearn": "scikit-learn", "PIL": "pillow"} | dict.fromkeys(
    ("nir", "onnx", "onnxscript", "onnxruntime"), '"timm-gac[export]"'
)
DESCRIPTION = (
    "Gated attention coding and spiking ResNets for timm: train, evaluate, look inside, publish, benchmark.\n"
    "`timm-gac COMMAND --help` explains a command, --version tells the version. Start with `timm-gac demo`.\n" + HELP
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status is 0, 1 where a check failed, 2 where the user has to change something.

    Args:
        arguments: What follows ``timm-gac``; of the process where left out.
    """
    # Threads that wait sleep instead of spinning: on busy cores an evaluation took 180 CPU-seconds, not 408. OpenMP
    # reads it when PyTorch is imported. The Makefile sets the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_gac").setLevel(logging.INFO)
    _announce_loading()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 1
        message = str(error)
    except ModuleNotFoundError as error:
        message = _how_to_install([name.partition(".")[0] for name in str(error.name).split()])
    except KeyboardInterrupt:
        message = "interrupted"
    sys.stderr.write(f"timm-gac: {message}\n")
    return 2


def _reader_has_gone() -> bool:
    """Whether nobody reads the output any more, as behind ``| head``, which is no error to tell of."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        gone = any(event & select.POLLERR for _, event in poll.poll(0))
        if gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
    except (AttributeError, OSError, ValueError):  # Windows, or an output that is no file
        return False
    return gone


def _how_to_install(packages: list[str]) -> str:
    plural = "s" if len(packages) > 1 else ""
    called = " ".join(dict.fromkeys(PYPI.get(package, package) for package in packages))  # one extra may have several
    return f"expected the package{plural} {', '.join(map(repr, packages))} for this, got none: pip install {called}"


class _Announcer(importlib.abc.MetaPathFinder):
    """Says that PyTorch is being loaded, which takes seconds, at the moment when that begins."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        """No module is found here."""
        if name == "torch":
            sys.meta_path.remove(self)
            sys.stderr.write("loading PyTorch ...\n")
            sys.stderr.flush()


def _announce_loading() -> None:
    """On a terminal, where somebody waits."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        sys.meta_path.insert(0, _Announcer())


def _run(given: list[str]) -> int:
    if given[:1] == ["--version"]:
        from .. import __version__

        sys.stdout.write(f"timm-gac {__version__}\n")
        return 0
    refuse_empty("timm-gac", given)
    plugins, given = take_plugins(given)
    for plugin in plugins:
        import_plugin(plugin)
    for words in (1, 2):
        name = " ".join(given[:words])
        if name == "train":  # parses its own options, whose defaults are those of the recipe given
            from .train import train

            return train(given[words:])
        if name in COMMANDS:
            return tyro.cli(_command(name), prog=f"timm-gac {name}", args=given[words:])
    _check_command(given)
    return _all_commands().cli(prog="timm-gac", description=DESCRIPTION, args=given)


def _check_command(given: list[str]) -> None:
    """Leave with status 2 and the nearest names where there is no such command."""
    group = ["bench"] if given[:1] == ["bench"] else []
    word = next(iter(given[len(group) :]), "-")
    known = [name.split()[-1] for name in COMMANDS if name.split()[:-1] == group] + ([] if group else ["bench"])
    if word.startswith("-") or word in known:
        return
    where = " ".join(["timm-gac", *group])
    sys.stderr.write(f"timm-gac: expected a command, got {word!r}{nearest(word, known)}: see {where} --help\n")
    raise SystemExit(2)


def _command(name: str) -> Callable[..., int]:
    """A command's function, which registers the models before it does its work."""
    module, _, function = COMMANDS[name].partition(":")
    command: Callable[..., int] = getattr(importlib.import_module(f".{module}", __package__), function)

    @functools.wraps(command)
    def run(*values: Any, **options: Any) -> int:
        importlib.import_module("timm_gac.models")  # `import timm_gac` has not done so in the console script's process
        return command(*values, **options)

    return run


def _all_commands() -> SubcommandApp:
    """The list of commands, each with the first line of its docstring; for help and for what is no command."""
    app, benchmarks = SubcommandApp(), SubcommandApp()
    for name in COMMANDS:

        def listed() -> int:
            raise AssertionError("expected the command itself to run: the list only describes it")

        listed.__doc__ = (_command(name).__doc__ or "").partition("\n")[0]
        group, _, subcommand = name.rpartition(" ")
        (benchmarks if group else app).command(name=subcommand)(listed)
    app.command(benchmarks, name="bench", help="Time kernels, networks, loops; compare loss curves.")
    return app
