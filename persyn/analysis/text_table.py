"""Lay out rows as a table of plain text, for objects that show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Value: TypeAlias = str | float | None


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    """Rows below the names of their columns, numbers right-aligned; columns without any value are left out."""
    parts = []
    for place, name in enumerate(columns):
        values = [row[place] for row in rows]
        if known := [value for value in values if value is not None]:
            cells = [name, *map(_cell, values)]
            align = str.ljust if isinstance(known[0], str) else str.rjust
            width = max(map(len, cells))
            parts.append([align(cell, width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*parts, strict=True))


def _cell(value: Value) -> str:
    match value:
        case None:
            return "-"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return value
