"""Print tables that fit the available width: numbers are never cut, and a table that is too wide becomes a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

#: Spaces between two columns.
_GAP = 2
#: Minimum width to which longer text is folded.
_NARROWEST = 10


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table fitted to the available width, or a list of each row's cells if that is too narrow.

    rows:      the cells, as text.
    is_number: per column; numbers are right-aligned and never folded.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    is_number: Sequence[bool]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for rich, in the available width."""
        widths = self._widths(options.max_width)
        if widths is None:
            yield self._list()
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, width, numeric in zip(self.columns, widths, self.is_number, strict=True):
            table.add_column(name, justify="right" if numeric else "left", overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*map(_text, row))
        yield table

    def fits(self, width: int) -> bool:
        """Whether the table fits this width, without becoming a list."""
        return self._widths(width) is not None

    def _widths(self, width: int) -> list[int] | None:
        cells = [[str(row[n]) for row in self.rows] for n in range(len(self.columns))]
        return _widths(self.columns, cells, self.is_number, width)

    def _list(self) -> Table:
        listed = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        listed.add_column(no_wrap=True, style="bold")
        listed.add_column(overflow="fold")
        for number, row in enumerate(self.rows):
            if number:
                listed.add_row("", "")
            for name, cell in zip(self.columns, row, strict=True):
                listed.add_row(name, _text(cell))
        return listed


def show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], is_number: Sequence[bool]) -> None:
    """Print a table; on a terminal too narrow for it, print each row as a list of its cells, folded by the terminal."""
    table = FittedTable(columns, rows, is_number)
    if table.fits(console.width):
        console.print(table)
    else:
        _show_list(console, columns, rows)


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell


def _widths(
    columns: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool], room: int
) -> list[int] | None:
    """The width of each column, None if they do not fit; text columns share what numbers leave."""
    longest = [max(map(cell_len, each), default=0) for each in cells]
    wanted = [max(most, cell_len(name)) for most, name in zip(longest, columns, strict=True)]
    least = [
        max(most if numeric else min(most, _NARROWEST), *map(cell_len, name.split() or [""]))
        for most, name, numeric in zip(longest, columns, is_number, strict=True)
    ]
    left = room - _GAP * (len(columns) - 1) - sum(least)
    if left < 0 and any(longest):
        return None
    # Narrowest first: the width that they do not need is left to wider columns.
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
