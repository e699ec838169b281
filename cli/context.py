"""Open the settings and the store for a command, and print tables and values."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from sqlalchemy.orm import Session
from tenacity import Retrying, retry_if_exception_type, wait_exponential

from persyn.cli import table
from persyn.cli.completion import run_names
from persyn.cli.waiting import waiting
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.connect import BRISK_SECONDS, Database, scratch
from persyn.errors import StoreUnavailable, UsageError
from persyn.jobs.workload import Backlog
from persyn.settings import Settings

log = logging.getLogger(__name__)

_ENDLESS = 1_000_000
#: Larger numbers are printed in scientific notation.
_LARGEST_IN_FULL = 1e15

RUN = click.argument("run", shell_complete=run_names)


class _Whole(click.ParamType[int]):
    """An integer in the range of every database; the range is not shown in the help."""

    name = "integer"

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the number; fail with a usage error."""
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not an integer.", param, ctx)
        if not self._least <= number <= self._most:
            self.fail(f"{number} is not in the range {self._least} to {self._most}.", param, ctx)
        return number


ID = _Whole(0, 2**63 - 1)
LIMIT = _Whole(1, 2**31 - 1)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@contextmanager
def store(*, patient: bool = False) -> Iterator[Database]:
    """Open the store of the environment; raise `UsageError` when its schema is at another revision.

    patient: wait for a database that does not respond yet, for services that start together with it; and limit the time
             that a writing transaction may be idle, since others wait for it.
    """
    limit = {"idle_seconds": BRISK_SECONDS} if patient else {}
    database = Database(Settings.from_environment().database_url, **limit)
    try:
        if patient:
            retrying = Retrying(
                retry=retry_if_exception_type(StoreUnavailable),
                wait=wait_exponential(multiplier=0.5, max=15),
                before_sleep=lambda tried: log.warning(
                    "the database is unavailable", extra={"tries": tried.attempt_number}
                ),
            )
            retrying(database.require_head)
        else:
            with waiting("opening the store"):
                database.require_head()
        database.announce = lambda: waiting("waiting for another process to finish writing to the store")
        yield database
    finally:
        database.close()


@contextmanager
def store_or_empty() -> Iterator[Database]:
    """Open the store; if it does not exist, use an empty temporary one instead of creating it."""
    database = Database(Settings.from_environment().database_url)
    try:
        is_there = database.is_there()
    finally:
        database.close()
    with store() if is_there else scratch() as found:
        yield found


def broker(settings: Settings) -> str:
    """The broker's URL; raise `UsageError` if it is not set."""
    if settings.broker_url is None:
        raise UsageError("PERSYN_BROKER_URL is not set; give redis://host:port/0, the same to every worker")
    return settings.broker_url


def nobody_takes(backlog: Backlog) -> str:
    """The message for a queue that no running worker serves."""
    need = f"{backlog.gpus} GPUs" if backlog.gpus > 1 else ["no GPU", "a GPU"][backlog.gpus]
    return (
        f"{backlog.jobs} jobs of {backlog.queue} are waiting, and no running worker takes them; "
        f"they need {need}, and a worker without --models or with --models naming it"
    )


def warn(text: str) -> None:
    """Print a warning to standard error."""
    click.echo(f"warning: {plain(text)}", err=True)


def find_run(session: Session, name: str) -> Run:
    """The run of this name; raise `UsageError` if there is none."""
    return lookup.run(session, name)


def show(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    as_json: bool,
    skip_empty: bool = False,
    separators: bool = False,
) -> None:
    """Print rows as a table, or as a JSON array of objects.

    skip_empty: omit columns in which every row is None from the table.
    separators: print integers as 1,234,567, for counts rather than ids.
    """
    if as_json:
        click.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=str, ensure_ascii=False))
        return
    if skip_empty:
        filled = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
        columns = [columns[place] for place in filled]
        rows = [[row[place] for place in filled] for row in rows]
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _ENDLESS  # in a pipe, each row is one line
    cells = [[_in_table(value, separators=separators) for value in row] for row in rows]
    table.show(console, columns, cells, [_is_number([row[place] for row in rows]) for place in range(len(columns))])


def _in_table(value: Any, *, separators: bool) -> str:
    is_count = separators and isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else cell(value)


def _is_number(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float) for value in known)


def cell(value: Any) -> str:
    """Format a value on one line, safe for a terminal."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%SZ}"
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
    return plain(text.replace("\n", "\\n"))


def number(value: float) -> str:
    """Four significant digits; a large number in full, with thousands separators."""
    rounded = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in rounded and abs(value) < _LARGEST_IN_FULL else rounded


def plain(text: str) -> str:
    """Escape the control characters of a text, except line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
