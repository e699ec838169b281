"""Run one query in a sandboxed child process: connect, restrict the connection, and return the answer.

The process has limits on memory and on temporary files, and its parent kills it when the time is up. Run as
`python -m persyn.sql.child`; reads a `QueryRequest` as JSON, writes a `QueryResult` or `QueryError`.
"""

from __future__ import annotations

import resource
import signal
import sqlite3
import sys
import time
from contextlib import closing
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
from msgspec import Struct

_MEMORY_BYTES = 2**30
_SQLITE_HEAP_BYTES = 2**28
#: Per temporary file of SQLite.
_FILE_BYTES = 2**32
_LONGEST_VALUE_BYTES = 2**26
#: SQLite instructions between two checks of the time limit.
_INSTRUCTIONS = 10_000
_AT_ONCE = 100
#: The parent kills it earlier; without a parent, it ends itself this long after its time limit.
_ALONE_SECONDS = 20.0

_SQLITE_ACTIONS = frozenset(
    (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
)
_SQLITE_FUNCTIONS_REFUSED = frozenset(("load_extension", "fts3_tokenizer"))
#: Read-only pragmas that describe the schema.
_SQLITE_PRAGMAS = frozenset(
    ("table_list", "table_info", "table_xinfo", "index_list", "index_info", "index_xinfo", "foreign_key_list")
)


class QueryRequest(Struct, frozen=True):
    """One statement with its limits.

    connect: arguments of the driver's `connect`.
    """

    is_sqlite: bool
    connect: dict[str, Any]
    statement: str
    parameters: dict[str, str | int | float | None]
    rows: int
    seconds: float
    bytes: int


class QueryResult(Struct, tag=True, frozen=True):
    """The answer, within the limits."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    is_truncated: bool


class QueryError(Struct, tag=True, frozen=True):
    """The reason why there is no answer."""

    reason: str
    is_late: bool = False


def answer(request: QueryRequest) -> QueryResult | QueryError:
    """Run the requested statement."""
    try:
        return _of_sqlite(request) if request.is_sqlite else _of_postgresql(request)
    except MemoryError:
        return QueryError("it needs too much memory")


def _read(cursor: Any, request: QueryRequest) -> QueryResult | QueryError:
    if cursor.description is None:
        return QueryError("it returns no rows; only SELECT is allowed here")
    columns = [column[0] for column in cursor.description]
    rows: list[tuple[Any, ...]] = []
    size = 0
    while batch := cursor.fetchmany(min(_AT_ONCE, request.rows + 1 - len(rows))):
        for row in batch:
            values = tuple(map(_simple, row))
            size += sum(map(_size, values))
            if len(rows) == request.rows or size > request.bytes:
                return QueryResult(columns, rows, is_truncated=True)
            rows.append(values)
    return QueryResult(columns, rows, is_truncated=False)


def _simple(value: Any) -> Any:
    """Convert a value to the type that SQLite would return: numeric aggregates to numbers, times to text."""
    if isinstance(value, str | int | float | bytes | None):
        return value
    if isinstance(value, Decimal):
        is_whole = value.is_finite() and abs(value) < 2**63 and value == value // 1
        return int(value) if is_whole else float(value)
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(" ", "microseconds")
    return msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=str)


def _size(value: Any) -> int:
    """Bytes of memory, including an array's elements."""
    return sys.getsizeof(value) + (sum(map(_size, value)) if isinstance(value, list | tuple) else 0)


def _of_sqlite(request: QueryRequest) -> QueryResult | QueryError:
    until = time.monotonic() + request.seconds
    try:
        with closing(sqlite3.connect(**request.connect, isolation_level=None)) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE_BYTES)
            connection.set_progress_handler(lambda: time.monotonic() > until, _INSTRUCTIONS)
            connection.set_authorizer(_allow)
            return _read(connection.execute(request.statement, request.parameters), request)
    except (sqlite3.Error, sqlite3.Warning) as error:
        said = str(error)
        hint = "; queries are read-only, use SELECT" if said.startswith("not authorized") else ""
        return QueryError(said + hint, is_late=said == "interrupted")


def _allow(action: int, what: str | None, which: str | None, schema: str | None, within: str | None) -> int:
    if action == sqlite3.SQLITE_PRAGMA:
        is_fine = what in _SQLITE_PRAGMAS
    elif action == sqlite3.SQLITE_FUNCTION:
        is_fine = which not in _SQLITE_FUNCTIONS_REFUSED
    elif action == sqlite3.SQLITE_UPDATE:
        # Table-valued functions such as json_each register themselves this way; the read-only file is not changed.
        is_fine = what == "sqlite_master"
    else:
        is_fine = action in _SQLITE_ACTIONS
    return sqlite3.SQLITE_OK if is_fine else sqlite3.SQLITE_DENY


def _of_postgresql(request: QueryRequest) -> QueryResult | QueryError:
    import psycopg
    from psycopg.types.json import set_json_loads

    try:
        with psycopg.connect(**{"connect_timeout": 10, **request.connect}) as connection:
            connection.read_only = True
            set_json_loads(lambda value: value if isinstance(value, str) else value.decode(), connection)
            milliseconds = max(1, int(request.seconds * 1000))
            for setting, value in {
                "statement_timeout": milliseconds,
                "lock_timeout": milliseconds,
                "idle_in_transaction_session_timeout": milliseconds + 10_000,
                "client_connection_check_interval": 1000,
                "standard_conforming_strings": "on",
                "timezone": "UTC",
            }.items():
                connection.execute("SELECT set_config(%s, %s, true)", (setting, str(value)))
            _step_down(connection)
            # A server-side cursor accepts only a query, neither a command nor a data-modifying statement.
            with connection.cursor("asked") as cursor:
                cursor.execute(request.statement, request.parameters)
                return _read(cursor, request)
    except psycopg.Error as error:
        reason = error.diag.message_primary or str(error)
        return QueryError(reason, is_late=isinstance(error, psycopg.errors.QueryCanceled))


def _step_down(connection: Any) -> None:
    """Drop superuser rights, which would allow reading server files and running programs."""
    (is_super,) = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    if is_super:
        connection.execute("SET LOCAL temp_file_limit = '4GB'")
        connection.execute("SET LOCAL ROLE pg_read_all_data")


def main() -> None:
    """Answer the request on standard input."""
    for limit, most in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    sqlite3.connect(":memory:").execute(f"PRAGMA hard_heap_limit={_SQLITE_HEAP_BYTES}")  # applies to the whole process
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=QueryRequest)
    # The alarm has no handler, so it ends the process even inside C code.
    signal.setitimer(signal.ITIMER_REAL, request.seconds + _ALONE_SECONDS)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer(request)))


if __name__ == "__main__":
    main()
