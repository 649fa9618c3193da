"""What every command line of this package refuses before it parses its options."""

from __future__ import annotations

from collections.abc import Sequence

# Options of any command that name a file or a folder; some take another name too, such as --data that of a data set.
PATHS = (
    "--against",
    "--answers",
    "--csv",
    "--data",
    "--data-dir",
    "--init",
    "--json",
    "--label-names",
    "--out",
    "--plugin",
    "--png",
    "--results",
    "--teacher",
    "--timm-train",
)


def refuse_empty(program: str, arguments: Sequence[str]) -> None:
    """Refuse empty arguments, which a shell makes of a variable that is not set.

    As a path, an empty word is the current folder to Python, so that a command would read or write what nobody named.
    After an option of `PATHS` the error asks for a path.

    Args:
        program: What stands before the arguments.
        arguments: What was given.

    Raises:
        ValueError: An argument is empty, or is an option with an equals sign and nothing behind it.
    """
    before, last = program, ""  # the word, and the option
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not argument or (equals and not value and option.startswith("--")):
            last = option.replace("_", "-") if equals else last
            kind = "a path" if last in PATHS else "a value" if last else "a path or a name"
            raise ValueError(
                f"expected {kind} after {option or before!r}, got an empty word: give one, and check that your shell's "
                "variable is set"
            )
        if argument.startswith("--"):
            last = option.replace("_", "-")
        before = argument
