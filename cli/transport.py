"""Set the transport of a run's models: what `persyn teachers set` and `persyn run set` share."""

from __future__ import annotations

import tomllib
from typing import Any

import click

from persyn.cli.context import find_run, plain, store, warn
from persyn.config import load_config
from persyn.db.catalog import RunState
from persyn.errors import UsageError
from persyn.jobs import owner
from persyn.runs import transport
from persyn.runs.checks import servers

VALUES = click.argument("values", metavar="KEY=VALUE...", nargs=-1, required=True)


def change(run: str, model: str, values: tuple[str, ...]) -> None:
    """Change one model of a run, and say what changed.

    model: as in `transport.change_one`.
    """
    given = dict(map(_parsed, values))
    with store() as database, database.write() as session:
        found = find_run(session, run)
        changes = transport.change_one(session, found, model, given, actor=owner.actor())
        config, state = load_config(found.config), found.state
    for each in changes:
        click.echo(plain(str(each)))
    if not changes:
        click.echo("nothing changed")
    whose = {"student": "the student", "quality": "the judge"}.get(model.partition(".")[0], model)
    for of, finding in servers.check(config):
        if of == whose:
            warn(f"{of}: {finding.message} (checked on this host; workers may differ)")
    if changes and state in (RunState.FAILED, RunState.CANCELLED, RunState.PAUSED):
        click.echo(f"run {run} is {state}; 'persyn run resume {run}' continues it")


def _parsed(text: str) -> tuple[str, Any]:
    """A key and its value, as TOML or else as text; None restores the default."""
    key, sign, said = text.partition("=")
    if not sign or not key:
        raise UsageError(f"expected KEY=VALUE, such as concurrency=8, got {text!r}")
    if not said:
        return key, None
    try:
        value = tomllib.loads(f"value = {said}")["value"]
    except tomllib.TOMLDecodeError:
        return key, said
    return key, value if isinstance(value, bool | int | float | str | list | dict) else said
