"""A rich table as lines of plain text."""

from __future__ import annotations

from io import StringIO
from typing import Any


def lines(table: Any, width: int) -> list[str]:
    """The lines of a `rich.table.Table` without colours, in at most `width` columns."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
