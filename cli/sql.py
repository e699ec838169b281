"""`persyn sql`: a question to the store."""

from __future__ import annotations

from typing import Any

import click
from sqlalchemy.orm import Session

from cli.open import JSON, show, store
from persyn.errors import UsageError


@click.command()
@click.argument("query")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(1), help="Rows at most.")
@JSON
def sql(query: str, limit: int, as_json: bool) -> None:
    """Ask the store a QUERY, one statement that reads; the connection can write nothing."""
    with store() as database, database.read() as session:
        columns, rows = _ask(session, query, limit + 1)
    show(columns, rows[:limit], as_json=as_json)
    if len(rows) > limit:
        click.echo(f"(the first {limit} rows; more with --limit)", err=True)


def _ask(session: Session, query: str, limit: int) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The columns and the first rows of an answer; `UsageError` when the database refuses, or answers no rows."""
    connection: Any = session.connection().connection.driver_connection
    dialect: Any = session.get_bind().dialect
    # A prepared statement is a single one: nobody ends the read-only transaction and begins another.
    # SQLite's driver takes no more than one anyway.
    how = {"prepare": True} if dialect.name == "postgresql" else {}
    try:
        cursor = connection.execute(query, **how)
        if cursor.description is None:
            raise UsageError("the query returns no rows; only questions can be asked here")
        return [column[0] for column in cursor.description], cursor.fetchmany(limit)
    except dialect.loaded_dbapi.Error as error:
        raise UsageError(f"the database refuses the query: {error}") from error
