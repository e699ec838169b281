"""Read and write the rows of whole tables, with a digest of their content that is the same on every database."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import JSON, Connection, Double, String, Table, insert, select
from sqlalchemy.types import TypeEngine

from persyn.errors import PersynError, shorten

Row: TypeAlias = Sequence[Any]
"""The values of a table's columns, in their order."""

#: Rows that a server sends at a time.
_FETCHED = 500
#: Integers in JSON from here on are compared as floats, because PostgreSQL returns a large float as an integer.
_EXACT = 2**53


def rows(connection: Connection, table: Table) -> Iterator[Row]:
    """All rows of a table in the order of its key, without having them all in memory."""
    # Only on PostgreSQL does the order of texts depend on the database; "C" is that of their bytes.
    is_postgresql = connection.dialect.name == "postgresql"
    order = [
        column.collate("C") if is_postgresql and isinstance(column.type, String) else column
        for column in table.primary_key.columns
    ]
    ordered = select(table).order_by(*order)
    yield from connection.execute(ordered, execution_options={"yield_per": _FETCHED})


class Digest:
    """SHA-256 of rows, in order, by their values and not by their form in a database.

    Objects in JSON are compared without the order of their keys, and numbers by value: PostgreSQL keeps neither the
    order of keys nor the form of a number, and SQLite no negative zero.
    """

    def __init__(self, table: Table) -> None:
        self._sha256 = hashlib.sha256()
        self._plain = [(place, plain) for place, column in enumerate(table.columns) if (plain := _plain(column.type))]

    def add(self, row: Row) -> int:
        """Include another row; return its size in bytes."""
        values = list(row)
        for place, plain in self._plain:
            if values[place] is not None:
                values[place] = plain(values[place])
        content = msgspec.msgpack.encode(values, order="sorted")
        self._sha256.update(content)
        return len(content)

    def hexdigest(self) -> str:
        """The digest of the rows so far."""
        return self._sha256.hexdigest()


def write(connection: Connection, table: Table, new: Sequence[Row]) -> None:
    """Insert rows, by COPY on PostgreSQL; raise `PersynError` for a value that the database cannot store."""
    if connection.dialect.name == "postgresql":
        _copy_in(connection, table, new)
        return
    _require_numbers(table, new)
    names = [column.name for column in table.columns]
    connection.execute(insert(table), [dict(zip(names, row, strict=True)) for row in new])


def restart_sequences(connection: Connection, tables: Sequence[Table]) -> None:
    """Let generated ids continue after the largest one; SQLite does so by itself."""
    if connection.dialect.name != "postgresql":
        return
    for table in tables:
        column = table.autoincrement_column
        if column is not None and column.identity is not None:
            sequence = f"pg_get_serial_sequence('{table.name}', '{column.name}')"
            largest = f"max({column.name})"
            connection.exec_driver_sql(
                f"SELECT setval({sequence}, coalesce({largest}, 1), {largest} IS NOT NULL) FROM {table.name}"  # noqa: S608
            )


def _copy_in(connection: Connection, table: Table, new: Sequence[Row]) -> None:
    import psycopg  # an optional package

    bind = [column.type.dialect_impl(connection.dialect).bind_processor(connection.dialect) for column in table.columns]
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as copy:
            for row in new:
                copy.write_row([act(value) if act else value for act, value in zip(bind, row, strict=True)])
    except psycopg.DataError as error:
        why = error.diag.message_primary or str(error)
        where = next((place for row in new if (place := _nul(table, row))), None)
        if where is not None:
            why = f"{where} has a NUL character, which PostgreSQL cannot store"
        raise PersynError(f"a row of table {table.name} cannot be copied: {shorten(why)}") from error


def _nul(table: Table, row: Row) -> str | None:
    """The column of a row that has a NUL character, with the row's key."""
    for column, value in zip(table.columns, row, strict=True):
        if "\0" in _texts(value):
            return f"column {column.name} of the row with {_key(table, row)}"
    return None


def _texts(value: Any) -> str:
    """All texts in a value, joined."""
    match value:
        case str():
            return value
        case dict():
            return "".join(_texts(part) for pair in value.items() for part in pair)
        case list():
            return "".join(_texts(part) for part in value)
    return ""


def _key(table: Table, row: Row) -> str:
    values = dict(zip((column.name for column in table.columns), row, strict=True))
    return ", ".join(f"{column.name} {values[column.name]!r}" for column in table.primary_key.columns)


def _require_numbers(table: Table, new: Sequence[Row]) -> None:
    """SQLite would store NaN as null."""
    places = [place for place, column in enumerate(table.columns) if isinstance(column.type, Double)]
    for row in new:
        for place in places:
            if row[place] is not None and math.isnan(row[place]):
                name = [column.name for column in table.columns][place]
                raise PersynError(
                    f"a row of table {table.name} cannot be copied: column {name} of the row with {_key(table, row)} "
                    "is not a number (NaN), which SQLite cannot store"
                )


def _plain(kind: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """What brings a column's values to the form in which they are compared; None if they have it."""
    if isinstance(kind, JSON):
        return _plain_json
    return _plain_float if isinstance(kind, Double) else None


def _plain_float(value: float) -> float:
    return value + 0.0  # -0.0 becomes 0.0


def _plain_json(value: Any) -> Any:
    match value:
        case dict():
            return {name: _plain_json(part) for name, part in value.items()}
        case list():
            return [_plain_json(part) for part in value]
        case bool():
            return value
        case int() | float():
            return _plain_number(value)
    return value


def _plain_number(value: float) -> float:
    if abs(value) < _EXACT:
        return int(value) if value == int(value) else value
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.copysign(math.inf, value)
