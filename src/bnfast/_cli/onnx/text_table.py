"""Tables as text; importing this imports rich."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def text_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    of_words: Collection[str],
    title: str = "",
    end: str = "",
) -> str:
    """Return a table between two texts, as wide as the terminal; elsewhere a row is a line.

    Columns whose headings are `of_words` begin at the left, those of numbers end at the right.
    """
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in of_words else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as captured:
        for part in (Text(title), table, Text(end)):
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
