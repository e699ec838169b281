"""Tables fit the terminal, and numbers are never cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from persyn.cli import table

COLUMNS = ("stage", "teacher", "prompts", "stored", "to ask", "prompt tokens", "response tokens", "US dollars")
ROW = ("calibrate", "qwen2.5-72b-instruct-of-a-long-name", "2,500", "0", "2,500", "1,234,567", "2,500,000", "123.4")


def shown(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    table.show(console, COLUMNS, [ROW, ROW], [False, False, *[True] * 6])
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return lines


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_every_figure_is_whole_and_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    words = [word for line in lines for word in line.split()]
    for figure in ROW[2:]:
        assert words.count(figure) >= 2


def test_what_does_not_fit_is_a_list() -> None:
    lines = shown(50)
    assert lines[0].split() == ["stage", "calibrate"]
    assert len(lines) == 2 * len(COLUMNS) + 1


def test_a_list_beside_others_is_folded_to_the_width_there_is() -> None:
    console = Console(file=io.StringIO(), width=40, highlight=False)
    console.print(table.FittedTable(COLUMNS, [ROW], [False, False, *[True] * 6]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 40
    assert "qwen2.5-72b-instruct-of-a-long-name" in "".join(line[len("response tokens") :].strip() for line in lines)
