"""`persyn trace`: where one response comes from."""

from __future__ import annotations

import click
import msgspec

from cli.open import ID, JSON, RUN, cell, find_run, show, store
from persyn import trace as history


@click.command()
@RUN
@click.argument("prompt", type=ID)
@JSON
def trace(run: str, prompt: int, as_json: bool) -> None:
    """Say where RUN's response to PROMPT (its id) comes from: scores, router, teacher, job, worker, engine, seed."""
    with store() as database, database.read() as session:
        found = history.trace(session, find_run(session, run), prompt)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    click.echo(f"prompt {found.prompt_id} ({found.role}): {cell(found.text)}")
    if found.assignment:
        click.echo(
            f"\nassigned to {found.teacher}: " + ", ".join(f"{k} {cell(v)}" for k, v in found.assignment.items())
        )
    _table("router scores", found.router_scores)
    for response in found.responses:
        click.echo(f"\nresponse of {response['teacher']}")
        for name, value in response.items():
            if name != "teacher" and value is not None:
                click.echo(f"  {name:<14} {cell(value)}")
    _table("events", found.events)


def _table(title: str, rows: list[dict[str, object]]) -> None:
    if rows:
        click.echo(f"\n{title}")
        show(list(rows[0]), [list(row.values()) for row in rows], as_json=False)
