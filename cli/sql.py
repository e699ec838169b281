"""`persyn sql`: a question to the store."""

from __future__ import annotations

import click

from cli.open import JSON, show, store
from persyn.questions import ask
from persyn.questions.ask import Limits


@click.command()
@click.argument("query")
@click.option("--limit", default=Limits().rows, show_default=True, type=click.IntRange(1), help="Rows at most.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(0.1), help="Time it may take.")
@JSON
def sql(query: str, limit: int, seconds: float, as_json: bool) -> None:
    """Ask the store a QUERY, one statement that reads; the connection can write nothing."""
    with store() as database:
        answer = ask.ask(database, query, limits=Limits(rows=limit, seconds=seconds, megabytes=256))
    show(answer.columns, answer.rows, as_json=as_json)
    if answer.is_truncated:
        click.echo(f"(the first {len(answer.rows)} rows; more with --limit)", err=True)
