"""`persyn sql`: a question to the store."""

from __future__ import annotations

import click
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ResourceClosedError

from cli.open import JSON, show, store
from persyn.errors import UsageError


@click.command()
@click.argument("query")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(1), help="Rows at most.")
@JSON
def sql(query: str, limit: int, as_json: bool) -> None:
    """Ask the store a QUERY; the connection can write nothing."""
    with store() as database, database.read() as session:
        try:
            # A colon in the question is a colon, not a parameter.
            result = session.execute(text(query.replace(":", r"\:")))
            columns, rows = list(result.keys()), [tuple(row) for row in result.fetchmany(limit + 1)]
        except DBAPIError as error:
            raise UsageError(f"the database refuses the query: {error.orig}") from error
        except ResourceClosedError as error:
            raise UsageError("the query returns no rows; only questions can be asked here") from error
    show(columns, rows[:limit], as_json=as_json)
    if len(rows) > limit:
        click.echo(f"(the first {limit} rows; more with --limit)", err=True)
