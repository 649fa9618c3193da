"""What every command shows and writes: a console, plain text of a user's names, checks before the work begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100  # columns of a table that no terminal shows


def create_console() -> Console:
    """A console for a command's output, 100 columns wide where no terminal shows it.

    Names of the user's go through it as `rich.text.Text` or with ``markup=False``: what stands in brackets in them is
    no markup.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.width = console.width if console.is_terminal else WIDTH
    return console


def wrote(console: Console, file: Path) -> None:
    """Say that a file was written."""
    console.print(f"wrote {plain(file)}", markup=False, highlight=False, soft_wrap=True)


def check_writable(folder: Path | None, option: str) -> None:
    """Refuse a folder that cannot be made or written, before the work that would be lost.

    Args:
        folder: The folder, which is not created here; None where nothing will be written.
        option: Name of the option that names it, for the error.

    Raises:
        ValueError: The folder cannot be created, or no file can be created in it.
    """
    if folder is None:
        return
    import tempfile

    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"expected a folder for {option}, got the file {str(place)!r}: choose another")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or "an error"
        raise ValueError(f"expected to write to {str(folder)!r}, got {reason}: choose another {option}") from error


def check_new_files(folder: Path | None, names: Iterable[str], overwrite: bool, option: str = "--out") -> None:
    """Refuse to replace files, and a folder that cannot be written.

    Args:
        folder: Where they will be written; None for nowhere.
        names: Their names.
        overwrite: Whether they may be replaced.
        option: Name of the option that names the folder or file.

    Raises:
        ValueError: One of them is there and ``overwrite`` is not set, or is a folder; or ``folder`` cannot be written.
    """
    if folder is None:
        return
    for file in (folder / name for name in names):
        if file.is_dir():
            raise ValueError(f"expected a file for {option}, got the folder {str(file)!r}: name a file in it")
        if file.exists() and not overwrite:
            raise ValueError(f"expected a new file, got {str(file)!r}, which is there: use --overwrite")
    check_writable(folder, option)


def check_new_file(file: Path | None, overwrite: bool, option: str = "--json") -> None:
    """`check_new_files` of one file; None is no file."""
    if file is not None:
        check_new_files(file.parent, [file.name], overwrite, option)


def check_figures(folder: Path | None, names: Iterable[str], overwrite: bool) -> None:
    """`check_new_files` of a folder with figures, for which matplotlib has to be installed too."""
    check_new_files(folder, names, overwrite)
    if folder is not None:
        check_packages("matplotlib")


def check_packages(*names: str) -> None:
    """Refuse to begin without the packages that the end of the work needs.

    Raises:
        ModuleNotFoundError: Some are missing, whose names it has, with spaces between; `main` says how to install them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"No module named {missing[0]!r}", name=" ".join(missing))


def nearest(word: str, known: Sequence[str]) -> str:
    """A question in brackets whether a name that is spelled like the word was meant; empty where none is."""
    from difflib import get_close_matches

    found = get_close_matches(word, known, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""
