"""Run one SQL query in a sandbox that cannot change data, reach other resources, or run without limits.

The query runs in a child process with its own connection: untrusted SQL can take all memory, or spend hours in a single
call of C code that no exception interrupts, but a child process can be limited and killed. The restrictions set on the
database connection are in `child.py`; the names a query may use on PostgreSQL, where a role can do more than read, are
in `postgres.py`.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec
from msgspec import Struct

from persyn.db.connect import Database
from persyn.errors import PersynError, UsageError, shorten
from persyn.sql import postgres
from persyn.sql.child import QueryError, QueryRequest, QueryResult

#: Allowance for starting the child, connecting, and transferring the answer.
_GRACE_SECONDS = 5.0


class Limits(Struct, frozen=True):
    """Limits of one query.

    rows, megabytes: of the answer; anything beyond is omitted.
    seconds:         until the query is aborted.
    """

    rows: int = 1000
    seconds: float = 10.0
    megabytes: float = 16.0


class Answer(Struct, frozen=True):
    """The result of a query."""

    columns: list[str]
    #: Text (including times and JSON), numbers, bytes and None; from PostgreSQL also booleans and arrays.
    rows: list[tuple[Any, ...]]
    #: Whether rows were omitted because of the limits.
    is_truncated: bool


def ask(
    database: Database,
    statement: str,
    parameters: Mapping[str, str | int | float | None] | None = None,
    limits: Limits | None = None,
) -> Answer:
    """Run one SELECT.

    parameters: values for the names that the statement contains as `:name`; they are bound, never interpolated.

    Raises `UsageError` for statements that are not allowed, errors of the database, and exceeded limits; `PersynError`
    when the child process ends prematurely.
    """
    limits = limits or Limits()
    request = requested(database, statement, dict(parameters or {}), limits)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "persyn.sql.child"],
            input=msgspec.json.encode(request),
            capture_output=True,
            timeout=limits.seconds + _GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(_too_slow(limits)) from error
    if child.returncode:
        said = shorten(child.stderr.decode(errors="replace")[-200:]) or "it may have run out of memory"
        raise PersynError(f"the query's process ended (exit code {child.returncode}): {said}")
    found = msgspec.msgpack.decode(child.stdout, type=QueryResult | QueryError)
    if isinstance(found, QueryError):
        raise UsageError(_too_slow(limits) if found.is_late else f"the database rejected the query: {found.reason}")
    if found.is_truncated and not found.rows:
        raise UsageError(f"the first row alone is larger than {limits.megabytes:g} MB; select fewer columns")
    return Answer(found.columns, found.rows, found.is_truncated)


def requested(database: Database, statement: str, parameters: dict[str, Any], limits: Limits) -> QueryRequest:
    """Build the child's request; raise `UsageError` for a statement that is not allowed."""
    for said in (statement, *(value for value in parameters.values() if isinstance(value, str))):
        if "\0" in said or any("\ud800" <= character <= "\udfff" for character in said):
            raise UsageError("the query contains a NUL character or invalid text")
    is_sqlite = database.url.get_backend_name() == "sqlite"
    if is_sqlite:
        # A URI, because only a URI can request read-only mode.
        file = Path(database.url.database or "").absolute().as_uri()
        connect: Any = {"database": f"{file}?mode=ro", "uri": True}
    else:
        statement = postgres.checked(statement, parameters)
        _, connect = database.url.get_dialect()().create_connect_args(database.url)
    return QueryRequest(
        is_sqlite=is_sqlite,
        connect={name: value for name, value in connect.items() if name != "context"},
        statement=statement,
        parameters=parameters,
        rows=limits.rows,
        seconds=limits.seconds,
        bytes=int(limits.megabytes * 1e6),
    )


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write an answer as CSV with unformatted values; arrays become JSON."""
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(
        [json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else value for value in row]
        for row in rows
    )


def _too_slow(limits: Limits) -> str:
    return f"the query took longer than {limits.seconds:g} s; narrow it down, or raise --seconds"
