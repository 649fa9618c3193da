"""What every command line of this package refuses before it parses its options."""

from __future__ import annotations

from collections.abc import Sequence


def refuse_empty(program: str, arguments: Sequence[str]) -> None:
    """Refuse empty arguments, which a shell makes of a variable that is not set.

    As a path, an empty word is the current folder to Python, so that a command would read or write what nobody named.

    Args:
        program: What stands before the arguments.
        arguments: What was given.

    Raises:
        ValueError: An argument is empty, or is an option with an equals sign and nothing behind it.
    """
    before = program
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not argument or (equals and not value and option.startswith("--")):
            raise ValueError(
                f"expected a word after {option or before!r}, got an empty one: name what you mean, such as . for the "
                "current folder"
            )
        before = argument
