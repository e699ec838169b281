"""Convert rows to Arrow some thousands at a time, for a Parquet file or a table in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa

_GROUP_ROWS = 10_000
_GROUP_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Columns:
    """How rows of one kind become columns.

    row:    converts one row to values.
    schema: the columns of a dataset, found from its first row; None for a dataset without rows.
    """

    row: Callable[[Any], dict[str, Any]]
    schema: Callable[[Any | None], pa.Schema]

    @contextmanager
    def file(self, path: Path) -> Iterator[Callable[[Any], object]]:
        """Create a Parquet file and yield a function that writes a row to it."""
        from pyarrow.parquet import ParquetWriter

        with path.open("xb") as file, ExitStack() as stack:
            writer: ParquetWriter | None = None

            def write(batch: pa.RecordBatch) -> None:
                nonlocal writer
                if writer is None:
                    writer = stack.enter_context(ParquetWriter(file, batch.schema, compression="zstd"))
                writer.write_batch(batch)

            group = _RowGroup(self, write)
            yield group.add
            group.flush()
            stack.close()
            file.flush()
            os.fsync(file.fileno())

    def table(self, rows: Iterable[Any]) -> pa.Table:
        """The rows as a table."""
        import pyarrow as pa

        batches: list[pa.RecordBatch] = []
        group = _RowGroup(self, batches.append)
        for row in rows:
            group.add(row)
        group.flush()
        return pa.Table.from_batches(batches, batches[0].schema if batches else self.schema(None))


class _RowGroup:
    """Buffer rows until a row group is full, then pass them to `write` as a record batch."""

    def __init__(self, columns: Columns, write: Callable[[pa.RecordBatch], object]) -> None:
        self._columns = columns
        self._write = write
        self._schema: pa.Schema | None = None
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._size = msgspec.json.Encoder().encode

    def add(self, row: Any) -> None:
        self._schema = self._schema or self._columns.schema(row)
        values = self._columns.row(row)
        self._rows.append(values)
        self._bytes += len(self._size(values))
        if len(self._rows) >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._write(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0
