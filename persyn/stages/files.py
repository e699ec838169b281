"""Records from files: JSONL, JSON, CSV and Parquet, read in constant memory.

Knows nothing of prompts. A record that cannot be read is a `Broken` in its place, so that one bad
line does not hide the next; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from persyn.errors import UsageError

#: A longer line, or CSV field, is no prompt; without a bound it would be read into memory whole.
MAX_BYTES = 16 * 2**20
_BATCH = 1_000
_BOM = b"\xef\xbb\xbf"

Record: TypeAlias = dict[str, Any]
"""One row: plain JSON values by field name."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Why there is no record in this place."""

    reason: str


Numbered: TypeAlias = tuple[int, Record | Broken]
"""A record, and the line it begins in (JSONL, CSV) or its row (JSON, Parquet), from 1."""


def records(path: Path) -> Iterator[Numbered]:
    """The records of a file, read as its name says.

    Raises `UsageError` at once for an unknown name or a file that is not there, and while
    iterating for one that is damaged as a whole.
    """
    name = path.name.lower()
    for ending, decode in _DECODERS.items():
        if name.endswith(ending):
            if path.is_dir():
                raise UsageError(f"{path} is a folder; give the files in it by their names")
            if not path.is_file():
                raise UsageError(f"there is no file {path}")
            return _guarded(path, decode)
    raise UsageError(f"cannot tell what {path} holds from its name; known endings: {', '.join(_DECODERS)}")


def _guarded(path: Path, decode: Callable[[Path], Iterator[Numbered]]) -> Iterator[Numbered]:
    number = 0
    try:
        for number, record in decode(path):
            yield number, record
    except (OSError, EOFError, zlib.error) as error:
        after = f" after row {number}" if number else ""
        raise UsageError(f"cannot read {path}{after}: {' '.join(str(error).split())}") from error


def _open(path: Path) -> io.BufferedReader[Any]:
    """Bytes of a file, unzipped, without the byte order mark that some editors put first."""
    is_gzip = path.suffix.lower() == ".gz"
    file: io.BufferedReader[Any] = io.BufferedReader(gzip.open(path)) if is_gzip else path.open("rb")  # noqa: SIM115
    if file.peek(len(_BOM)).startswith(_BOM):
        file.read(len(_BOM))
    return file


def _jsonl(path: Path) -> Iterator[Numbered]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line is None:
                yield number, Broken(f"longer than {MAX_BYTES:,} bytes")
            elif not line.isspace():
                yield number, _record(line)


def _lines(file: io.BufferedReader[Any]) -> Iterator[bytes | None]:
    """Lines, ended by a line feed and nothing else; None for one that is too long."""
    while line := file.readline(MAX_BYTES + 1):
        if len(line) <= MAX_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(MAX_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def _json(path: Path) -> Iterator[Numbered]:
    """The file's bytes are held whole, its objects one at a time; many rows are better kept as JSONL."""
    with _open(path) as file:
        data = file.read()
    try:
        items = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        yield 1, Broken(f"not one JSON array: {error}; a file with one object per line is named .jsonl")
        return
    for number, item in enumerate(items, 1):
        yield number, _record(item)


def _record(data: bytes | msgspec.Raw) -> Record | Broken:
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError:
        return Broken("not UTF-8")
    except RecursionError:
        return Broken("nested too deep")
    except msgspec.DecodeError as error:
        return Broken(_why_not_json(bytes(data), error))
    return value if isinstance(value, dict) else Broken("not a JSON object")


def _why_not_json(data: bytes, error: msgspec.DecodeError) -> str:
    """Tell a lone surrogate, which the standard library's more lenient reader lets pass, from broken JSON."""
    try:
        msgspec.json.encode(json.loads(data))
    except UnicodeEncodeError:
        return "a lone surrogate: half of a character escaped as two"
    except (ValueError, RecursionError):
        pass
    return f"not JSON: {error}"


def _csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(MAX_BYTES)
    with io.TextIOWrapper(_open(path), encoding="utf-8", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, Broken(f"not CSV: {error}")
                continue
            if header is None:
                header = cells
            elif cells:
                yield line, _csv_record(header, cells)


def _csv_record(header: list[str], cells: list[str]) -> Record | Broken:
    """A cell of nothing is a field that is not there, but for the prompt, which must not be empty."""
    if len(cells) != len(header):
        return Broken(f"{len(cells)} fields, where the header has {len(header)}")
    if len(set(header)) != len(header):
        return Broken("the header names a column twice")
    try:
        "".join((*header, *cells)).encode()
    except UnicodeEncodeError:
        return Broken("not UTF-8")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell or name == "prompt"}


def _parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            batches = file.iter_batches(batch_size=_BATCH)
            yield from enumerate((record for batch in batches for record in _parquet_records(batch)), 1)
    except ArrowException as error:
        raise OSError(str(error)) from error


def _parquet_records(batch: Any) -> Iterator[Record | Broken]:
    try:
        yield from _as_json(batch)
    except _NOT_JSON:
        # Arrow takes any bytes for a string, and has values that JSON has not: find whose row it is.
        for row in range(batch.num_rows):
            try:
                yield from _as_json(batch.slice(row, 1))
            except UnicodeDecodeError:
                yield Broken("not UTF-8")
            except _NOT_JSON as error:
                yield Broken(f"a value that JSON cannot hold: {error}")


#: What a value that JSON has not ends in: a date beyond all years or in no known time zone among them.
_NOT_JSON = (ValueError, TypeError, OverflowError, KeyError)


def _as_json(batch: Any) -> list[Record]:
    """Times and decimals become text, bytes are the text that they spell, NaN becomes null."""
    return [msgspec.json.decode(msgspec.json.encode(_as_text(record), enc_hook=str)) for record in batch.to_pylist()]


def _as_text(value: Any) -> Any:
    """The same with text for bytes: a column of text need not say that it is one."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _as_text(part) for name, part in value.items()}
    return [_as_text(part) for part in value] if isinstance(value, list | tuple) else value


_DECODERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".parquet": _parquet,
}
