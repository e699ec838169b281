"""Read records from JSONL, JSON, CSV and Parquet files in constant memory.

This module knows nothing of prompts. An unreadable record is yielded as `QueryError` in its place, so that one bad line
does not hide the next; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from persyn.errors import UsageError
from persyn.ingest import csv_file, parquet_file, strict_json
from persyn.ingest.encoding import open_text
from persyn.ingest.record import MAX_BYTES, Flaw, Numbered, Record, UnreadableRecord

_ARRAY = "; a file that contains one JSON array must be named .json"


def records(path: Path) -> Iterator[Numbered]:
    """Yield the records of a file, in the format that its name indicates.

    Raises `UsageError` at once for an unknown file type or a missing file, and during iteration for a damaged file.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the names of files in it")
    name = path.name.lower()
    for ending, decode in _DECODERS.items():
        if name.endswith(ending):
            if not path.is_file():
                raise UsageError(f"there is no file {path}")
            return _guarded(path, decode)
    raise UsageError(f"cannot tell the format of {path} from its name; known extensions: {', '.join(_DECODERS)}")


def _guarded(path: Path, decode: Callable[[Path], Iterator[Numbered]]) -> Iterator[Numbered]:
    number = 0
    try:
        for number, record in decode(path):
            yield number, record
    except (OSError, EOFError, zlib.error) as error:
        after = f" after row {number}" if number else ""
        raise UsageError(f"cannot read {path}{after}: {' '.join(str(error).split())}") from error


def _jsonl(path: Path) -> Iterator[Numbered]:
    with open_text(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line is None:
                yield number, UnreadableRecord(f"longer than {MAX_BYTES:,} bytes")
            elif not line.isspace():
                yield number, _record(line)


def _lines(file: io.BufferedReader[Any]) -> Iterator[bytes | None]:
    """Yield lines separated by line feeds only; None for one that is too long."""
    while line := file.readline(MAX_BYTES + 1):
        if len(line) <= MAX_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(MAX_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def _json(path: Path) -> Iterator[Numbered]:
    """Hold the file's bytes in memory, but only one object at a time; JSONL suits many rows better."""
    with open_text(path) as file:
        data = file.read()
    try:
        items: list[msgspec.Raw] | list[Any] = _items(data)
    except Flaw as flaw:
        yield 1, UnreadableRecord(f"not one JSON array: {flaw}; a file with one object per line must be named .jsonl")
        return
    for number, item in enumerate(items, 1):
        yield number, _record(bytes(item)) if isinstance(item, msgspec.Raw) else _as_record(item)


def _items(data: bytes) -> list[msgspec.Raw] | list[Any]:
    try:
        return msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        value = strict_json.decode(data)  # the data may contain NaN, or this error message is clearer
        if not isinstance(value, list):
            raise Flaw(str(error)) from error
        return value


def _record(data: bytes) -> Record | UnreadableRecord:
    try:
        return _as_record(strict_json.decode(data))
    except Flaw as flaw:
        is_array = data.lstrip().startswith(b"[")
        return UnreadableRecord(f"{flaw}{_ARRAY if is_array else ''}", advice=flaw.advice)


def _as_record(value: Any) -> Record | UnreadableRecord:
    return (
        value
        if isinstance(value, dict)
        else UnreadableRecord("not a JSON object" + (_ARRAY if isinstance(value, list) else ""))
    )


_DECODERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".csv": csv_file.read,
    ".csv.gz": csv_file.read,
    ".parquet": parquet_file.read,
}
