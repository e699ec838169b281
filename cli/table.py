"""Tables that fit the width there is: no figure is cut, and what does not fit at all becomes a list."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Between two columns.
_GAP = 2
#: Text is folded to no less than this, where it is longer.
_NARROWEST = 10


def show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], is_number: Sequence[bool]) -> None:
    """Print a table; on a terminal too narrow for it, each row as a list of its cells.

    rows:      the cells, as text.
    is_number: of each column; figures stand on the right, and whole.
    """
    cells = [[row[n] for row in rows] for n in range(len(columns))]
    widths = _widths(columns, cells, is_number, console.width)
    if widths is None:
        _show_list(console, columns, rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, width, numeric in zip(columns, widths, is_number, strict=True):
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _widths(
    columns: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool], room: int
) -> list[int] | None:
    """How wide each column is to be, None where they do not fit; texts share what figures leave."""
    longest = [max(map(cell_len, each), default=0) for each in cells]
    wanted = [max(most, cell_len(name)) for most, name in zip(longest, columns, strict=True)]
    least = [
        max(most if numeric else min(most, _NARROWEST), *map(cell_len, name.split() or [""]))
        for most, name, numeric in zip(longest, columns, is_number, strict=True)
    ]
    left = room - _GAP * (len(columns) - 1) - sum(least)
    if left < 0 and any(longest):
        return None
    # The narrowest first: what it does not need is left to the wider ones.
    widths = list(least)
    for place, n in enumerate(sorted(range(len(columns)), key=lambda n: wanted[n] - least[n])):
        more = min(wanted[n] - least[n], max(left, 0) // (len(columns) - place))
        widths[n] += more
        left -= more
    return widths


def _show_list(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width = max(map(len, columns))
    for number, row in enumerate(rows):
        if number:
            console.print()
        for name, cell in zip(columns, row, strict=True):
            console.print(Text(f"{name:<{width}}  ", style="bold") + Text(cell), soft_wrap=True)
