"""Ask the store one thing in SQL, where the question can change nothing, reach nothing else and not run for ever.

It is answered in a child process, on a connection of its own: SQL of a stranger can take all memory, or hours inside
one call of C code that no exception stops, and a child can be given limits and ended. What the databases are told
stands in `child.py`; what a question may name on PostgreSQL, where a role can do more than read, in `postgres.py`.
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
from persyn.sql.child import Broken, Found, Request

#: To start the child, connect, and give back what was found.
_GRACE_SECONDS = 5.0


class Limits(Struct, frozen=True):
    """How much one question may take.

    rows, megabytes: of the answer; what is beyond is left out. seconds: until there is an answer, or none.
    """

    rows: int = 1000
    seconds: float = 10.0
    megabytes: float = 16.0


class Answer(Struct, frozen=True):
    """What a question brought."""

    columns: list[str]
    #: Text (times and JSON too), numbers, bytes, None; of PostgreSQL also booleans and arrays.
    rows: list[tuple[Any, ...]]
    #: There are more rows than the limits let through.
    is_truncated: bool


def ask(
    database: Database,
    statement: str,
    parameters: Mapping[str, str | int | float | None] | None = None,
    limits: Limits | None = None,
) -> Answer:
    """Answer one SELECT.

    parameters: values of the names that the statement has as `:name`; bound, never pasted.

    Raises `UsageError` for what cannot be asked here, what the database refuses, and what exceeds the limits;
    `PersynError` when the process that answers ends before it has.
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
        said = shorten(child.stderr.decode(errors="replace")[-200:]) or "it may have needed too much memory"
        raise PersynError(f"the question ended its process (exit code {child.returncode}): {said}")
    found = msgspec.msgpack.decode(child.stdout, type=Found | Broken)
    if isinstance(found, Broken):
        raise UsageError(_too_slow(limits) if found.is_late else f"the database refuses the question: {found.reason}")
    if found.is_truncated and not found.rows:
        raise UsageError(f"the first row alone is larger than {limits.megabytes:g} MB; ask for fewer columns")
    return Answer(found.columns, found.rows, found.is_truncated)


def requested(database: Database, statement: str, parameters: dict[str, Any], limits: Limits) -> Request:
    """What the child is told; `UsageError` when it may not be asked."""
    for said in (statement, *(value for value in parameters.values() if isinstance(value, str))):
        if "\0" in said or any("\ud800" <= character <= "\udfff" for character in said):
            raise UsageError("the question holds a NUL character, or what is no text at all")
    is_sqlite = database.url.get_backend_name() == "sqlite"
    if is_sqlite:
        # As a URI, so that it can be said that it is only read.
        file = Path(database.url.database or "").absolute().as_uri()
        connect: Any = {"database": f"{file}?mode=ro", "uri": True}
    else:
        statement = postgres.checked(statement, parameters)
        _, connect = database.url.get_dialect()().create_connect_args(database.url)
    return Request(
        is_sqlite=is_sqlite,
        connect={name: value for name, value in connect.items() if name != "context"},
        statement=statement,
        parameters=parameters,
        rows=limits.rows,
        seconds=limits.seconds,
        bytes=int(limits.megabytes * 1e6),
    )


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write an answer as CSV, each value as it is; an array as JSON."""
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(
        [json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else value for value in row]
        for row in rows
    )


def _too_slow(limits: Limits) -> str:
    return f"the question took longer than {limits.seconds:g} s; narrow it down, or give it more seconds"
