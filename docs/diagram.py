"""The store's tables with their keys, and which belongs to which, as a picture. Knows no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import Column, Table, UniqueConstraint

from persyn.db import Base

#: Where a table stands: columns from the left, tables from the top. What a table points to is best left of it.
PLACES = (
    ("prompts", "teachers", "students", "scorers", "routers"),
    ("runs", "run_prompts", "run_teachers", "router_scores", "trainings"),
    ("jobs", "outages", "assignments", "responses", "scores"),
    ("events", "loads", "batches", "evaluations", "outcomes", "rate_limits", "leader"),
    ("expenses", "planned_work", "prices", "fallbacks", "charts", "chart_points"),
)
#: What is pointed to most has a colour of its own; each has a contrast of 3 or more on white and on black.
_COLOURS = {
    "prompts": "#2f7fc1",
    "teachers": "#c9701c",
    "runs": "#1f9a73",
    "jobs": "#a866c0",
    "students": "#d14d57",
    "scorers": "#8c7a2b",
}
_GREY = "#7d838c"

#: In pixels: a table and a line of it, and what is between tables, beside each other and one above the other.
_WIDTH, _LINE, _BESIDE, _BELOW = 168, 16, 62, 18
_LEFT, _TOP = 22, 8
_STYLE = """
text { font: 11px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1b1c1f }
.bold { font-weight: bold }
rect { fill: #fff; stroke: #7d838c }
path { fill: none; stroke-width: 1.3 }
@media (prefers-color-scheme: dark) { text { fill: #e7e7ea } rect { fill: #1e2129 } }
"""


@dataclass(frozen=True, slots=True)
class Box:
    """A table where it stands, in pixels from the top left; below its name a line for each key."""

    table: Table
    x: int
    y: int
    keys: list[Column[object]]

    @property
    def colour(self) -> str:
        """Of what points to it."""
        return _COLOURS.get(self.table.name, _GREY)

    @property
    def height(self) -> int:
        """The name's line and the keys'."""
        return (len(self.keys) + 1) * _LINE + 4

    def line(self, number: int) -> int:
        """The middle of a line; the name's is 0."""
        return self.y + number * _LINE + 10


def picture() -> str:
    """Draw the tables as SVG that needs nothing else and fits light and dark."""
    boxes = _boxes(Base.metadata.tables)
    width = 2 * _LEFT + len(PLACES) * (_WIDTH + _BESIDE) - _BESIDE
    height = max(box.y + box.height for box in boxes.values()) + _TOP
    said = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        f"<title>The tables of the store, their keys, and which belongs to which</title>\n<style>{_STYLE}</style>",
        *(line for box in boxes.values() for line in _curves(box, boxes)),
        *(line for box in boxes.values() for line in _drawn(box)),
        "</svg>\n",
    ]
    return "\n".join(said)


def _boxes(tables: Mapping[str, Table]) -> dict[str, Box]:
    placed = {name for column in PLACES for name in column}
    assert placed == set(tables), f"docs/diagram.py: PLACES and the tables differ by {placed ^ set(tables)}"
    boxes = {}
    for at, column in enumerate(PLACES):
        y = _TOP
        for name in column:
            keys = [each for each in tables[name].columns if _is_key(each)]
            boxes[name] = Box(tables[name], _LEFT + at * (_WIDTH + _BESIDE), y, keys)
            y += boxes[name].height + _BELOW
    return boxes


def _is_key(column: Column[object]) -> bool:
    table: Table = column.table  # of a model, not of a query
    is_unique = any(isinstance(each, UniqueConstraint) and list(each.columns) == [column] for each in table.constraints)
    return column.primary_key or bool(column.foreign_keys) or is_unique


def _curves(box: Box, boxes: Mapping[str, Box]) -> Iterator[str]:
    """From each foreign key to the name of the table that it points to; dashed where it may be null."""
    for number, key in enumerate(box.keys, 1):
        for foreign in key.foreign_keys:
            aim = boxes[foreign.column.table.name]
            y, aim_y = box.line(number), aim.line(0)
            aim_x, bend = (aim.x + _WIDTH, 50) if aim.x < box.x else (aim.x, -18)
            curve = f"M {box.x} {y} C {box.x - abs(bend)} {y} {aim_x + bend} {aim_y} {aim_x} {aim_y}"
            dashes = ' stroke-dasharray="4 3"' * bool(key.nullable)
            yield f'<path d="{curve}" stroke="{aim.colour}"{dashes}/>'
            yield f'<circle cx="{box.x}" cy="{y}" r="3" fill="{aim.colour}"/>'


def _drawn(box: Box) -> Iterator[str]:
    yield f'<rect x="{box.x}" y="{box.y}" width="{_WIDTH}" height="{box.height}" rx="3"/>'
    yield f'<path d="M {box.x} {box.y + 19} h {_WIDTH}" stroke="{box.colour}"/>'
    yield f'<text class="bold" x="{box.x + 8}" y="{box.line(0) + 3}">{box.table.name}</text>'
    for number, key in enumerate(box.keys, 1):
        bold = ' class="bold"' * key.primary_key
        yield f'<text{bold} x="{box.x + 8}" y="{box.line(number) + 4}">{key.name}</text>'
