"""How the command line shows lists."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

__all__ = ["date_text", "print_table"]

_WIDE = 1000
"""Columns, where nobody looks: programs that read a table want whole lines."""


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = (), foot: Sequence[str] = ()
) -> None:
    """`numbers` names the columns that are aligned on the right; `foot` is a last row apart from the others."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_footer=bool(foot), footer_style="bold"
    )
    for name, total in zip(head, foot or [""] * len(head), strict=True):
        table.add_column(name, total, justify="right" if name in numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # names are no markup
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)


def date_text(moment: float | None, *, missing: str = "-") -> str:
    """A Unix time in UTC, to the minute."""
    return missing if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")
