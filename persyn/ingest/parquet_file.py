"""Read records from Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from persyn.errors import UsageError
from persyn.ingest import strict_json
from persyn.ingest.record import Flaw, Numbered, Record, UnreadableRecord

_BATCH = 1_000


def read(path: Path) -> Iterator[Numbered]:
    """Yield the records of a file, one batch in memory at a time; raise `OSError` for a damaged file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            _require_unique(path, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH)
            yield from enumerate((record for batch in batches for record in _records(batch)), 1)
    except ArrowException as error:
        raise OSError(str(error)) from error


def _require_unique(path: Path, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"cannot read {path}: it has two columns named {twice[0]!r}")


def _records(batch: Any) -> Iterator[Record | UnreadableRecord]:
    try:
        yield from _as_json(batch)
    except _NOT_JSON:
        # Arrow accepts arbitrary bytes as strings, and has values that JSON lacks: find the rows that contain them.
        for row in range(batch.num_rows):
            try:
                yield from _as_json(batch.slice(row, 1))
            except UnicodeDecodeError:
                yield UnreadableRecord("not UTF-8")
            except Flaw as flaw:
                yield UnreadableRecord(str(flaw))
            except _NOT_JSON as error:
                yield UnreadableRecord(f"a value that JSON cannot represent: {error}")


#: Errors raised for values that JSON lacks, such as a date out of range or in an unknown time zone.
_NOT_JSON = (ValueError, TypeError, OverflowError, KeyError, Flaw)


def _as_json(batch: Any) -> list[Record]:
    """Convert to JSON values: times and decimals become text, bytes are decoded as UTF-8, NaN becomes null."""
    spelled = {field.name: decode for field in batch.schema if (decode := _spelled(field.type))}
    records = batch.to_pylist()
    for record in records if spelled else ():
        record |= {name: decode(record[name]) for name, decode in spelled.items()}
    return [msgspec.json.decode(msgspec.json.encode(_as_text(record), enc_hook=str)) for record in records]


def _spelled(of: Any) -> Callable[[Any], Any] | None:
    """A decoder for a column's type if it contains JSON text; None if it does not.

    The library `datasets` stores values of mixed types as JSON text, such as turns with different keys.
    """
    from pyarrow import types

    if getattr(of, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else strict_json.decode(value.encode())
    if types.is_list(of) or types.is_large_list(of):
        return _each(_spelled(of.value_type))
    if types.is_struct(of):
        return _fields({field.name: decode for field in of if (decode := _spelled(field.type))})
    return None


def _each(decode: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    return decode and (lambda values: None if values is None else [decode(value) for value in values])


def _fields(decoders: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any] | None:
    if not decoders:
        return None
    return lambda value: value and value | {name: decode(value[name]) for name, decode in decoders.items()}


def _as_text(value: Any) -> Any:
    """Decode bytes to text, recursively: a text column need not be declared as one."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _as_text(part) for name, part in value.items()}
    return [_as_text(part) for part in value] if isinstance(value, list | tuple) else value
