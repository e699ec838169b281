"""Read records from CSV files separated by commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from persyn.errors import UsageError
from persyn.ingest.encoding import not_utf8, open_text
from persyn.ingest.layouts import KNOWN
from persyn.ingest.record import MAX_BYTES, Flaw, Numbered, Record, UnreadableRecord

_DELIMITERS = ",;\t|"
#: An empty cell means that the field is absent, except in these columns, where it is an error to report.
_KEPT_EMPTY = frozenset({"prompt", "input"})


def read(path: Path) -> Iterator[Numbered]:
    """Yield the records of a file, whose first non-blank line is the header.

    Raises `UsageError` for an unusable header, and for a line or cell above the size limit.
    """
    csv.field_size_limit(MAX_BYTES)
    with io.TextIOWrapper(open_text(path), encoding="utf-8", errors="surrogateescape", newline="") as text:
        lines = _lines(path, text)
        before, first = 0, ""
        for first in lines:
            if not first.isspace():
                break
            before += 1
        delimiter = _told_delimiter(first)
        if delimiter:
            before, first = before + 1, next(lines, "")
        delimiter = delimiter or _delimiter(first)
        # With a space after each delimiter, a quote would not start its cell and would be read literally.
        is_spaced = any(name.startswith(" ") for name in next(csv.reader([first], delimiter=delimiter), [])[1:])
        rows = csv.reader(chain([first], lines), delimiter=delimiter, skipinitialspace=is_spaced, strict=True)
        yield from _records(path, _Rows(path, rows, before))


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """Yield lines with their line ends, with a limit on their length, because the CSV reader has none."""
    number = 0
    while line := text.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
            raise UsageError(f"cannot read {path}: line {number:,} is longer than {MAX_BYTES:,} characters")
        yield line


def _told_delimiter(line: str) -> str | None:
    """The delimiter declared by a spreadsheet's first line, such as sep=;."""
    told = line.strip("\r\n")
    return told[4] if len(told) == 5 and told.lower().startswith("sep=") else None


def _delimiter(header: str) -> str:
    """The delimiter: the one that splits the header or, if several do, the one that yields a known field name."""
    names = {
        each: [name.strip().lower() for name in next(csv.reader([header], delimiter=each))] for each in _DELIMITERS
    }
    splitting = [each for each in _DELIMITERS if len(names[each]) > 1]
    telling = [each for each in splitting if KNOWN.intersection(names[each])]
    return next((found[0] for found in (splitting, telling) if len(found) == 1), ",")


@dataclass(slots=True)
class _Rows:
    """The rows of a CSV reader, each with the number of its first line.

    before: lines of the file that precede the reader's input.
    """

    path: Path
    reader: Any
    before: int

    def __iter__(self) -> Iterator[tuple[int, list[str] | UnreadableRecord]]:
        while True:
            line = self.before + self.reader.line_num + 1
            try:
                yield line, next(self.reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, self._broken(line, str(error))

    def _broken(self, line: int, error: str) -> UnreadableRecord:
        last = self.before + self.reader.line_num
        n_lines = last - line + 1
        if "field limit" in error:
            raise UsageError(
                f"cannot read {self.path}: the row on line {line:,} has a cell of more than {MAX_BYTES:,} characters; "
                "perhaps a quote is never closed"
            )
        if error == "unexpected end of data":
            error = "a quote is opened and never closed"
        lost = f"; lines {line:,} to {last:,} ({n_lines:,} lines) cannot be read" if n_lines > 1 else ""
        return UnreadableRecord(f"not CSV: {error}{lost}", n_lines)


def _records(path: Path, rows: _Rows) -> Iterator[Numbered]:
    header: list[str] | None = None
    for line, cells in rows:
        if isinstance(cells, UnreadableRecord):
            if header is None:
                raise UsageError(f"cannot read the header of {path}: {cells.reason}")
            yield line, cells
        elif header is None:
            header = _header(path, cells) if cells else None
        elif cells:
            yield line, _record(header, cells)


def _header(path: Path, cells: list[str]) -> list[str]:
    if flaw := _not_text(cells):
        raise UsageError(f"cannot read the header of {path}: {flaw}; {flaw.advice}")
    header = [name.strip() for name in cells]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UsageError(f"cannot read {path}: its header names the column {twice[0]!r} twice")
    return header


def _record(header: list[str], cells: list[str]) -> Record | UnreadableRecord:
    """Build a record; an empty cell is an absent field, except in the prompt's columns."""
    if len(cells) != len(header):
        return UnreadableRecord(f"{len(cells)} fields, but the header has {len(header)}")
    if flaw := _not_text(cells):
        return UnreadableRecord(str(flaw), advice=flaw.advice)
    if [cell.strip("\ufeff \t") for cell in cells] == header:
        return UnreadableRecord("a repeated header, as in concatenated files")
    if header.count("") > 1 and any(cell for name, cell in zip(header, cells, strict=True) if not name):
        return UnreadableRecord("a cell in one of several columns that have no name")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell or name.lower() in _KEPT_EMPTY}


def _not_text(cells: list[str]) -> Flaw | None:
    """Why cells are not valid text; None if they are."""
    row = ",".join(cells)
    try:
        row.encode()
    except UnicodeEncodeError:
        return not_utf8(row.encode(errors="surrogateescape"))
    return None
