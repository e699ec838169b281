"""What every command opens first: the settings and the store, at the right revision."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.settings import Settings

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@contextmanager
def store() -> Iterator[Database]:
    """The store of the environment; `UsageError` when it is not at this code's revision."""
    database = Database(Settings.from_environment().database_url)
    try:
        database.require_head()
        yield database
    finally:
        database.close()


def broker(settings: Settings) -> str:
    """The broker's address, or `UsageError`."""
    if settings.broker_url is None:
        raise UsageError("PERSYN_BROKER_URL is not set; give redis://host:port/0, the same to every worker")
    return settings.broker_url


def actor() -> str:
    """Who gives this command, for the audit."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def find_run(session: Session, name: str) -> Run:
    """The run of this name, or `UsageError`."""
    run = session.scalars(select(Run).where(Run.name == name)).one_or_none()
    if run is None:
        raise UsageError(f"there is no run named {name!r}; 'persyn run list' shows which there are")
    return run


def show(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool) -> None:
    """Print rows as a table, or as a JSON array of objects."""
    if as_json:
        click.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=str, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = all(isinstance(row[number], int | float) for row in rows) and rows
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    Console(highlight=False).print(table)


def cell(value: Any) -> str:
    """A value on one line, harmless on a terminal."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
    return plain(text.replace("\n", "\\n"))


def plain(text: str) -> str:
    """A text whose control characters are shown, not obeyed; only line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
