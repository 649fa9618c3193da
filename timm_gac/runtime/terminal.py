"""What a terminal shows: names that can be printed, and tables of one look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def plain(text: object) -> str:
    """A name for a terminal: what cannot be printed, such as control characters, becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def new_table(
    title: str, text: Iterable[str] = (), numbers: Iterable[str] = (), no_wrap: bool = True, **style: Any
) -> Table:
    """A table without rows.

    Args:
        title: Above the table, as it is: what stands in brackets in a folder's name is no markup.
        text: Headings of the first columns.
        numbers: Headings of the columns behind them, whose entries are aligned to the right.
        no_wrap: Keep each entry on one line.
        style: Further arguments of `rich.table.Table`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plain(title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, **style)
    for heading in text:
        table.add_column(heading, no_wrap=no_wrap)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=no_wrap)
    return table
