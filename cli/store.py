"""`persyn store`: copy a whole store to another database."""

from __future__ import annotations

import click
import msgspec

from persyn.cli.context import JSON, show
from persyn.cli.progress import Meter
from persyn.operations.copying import copy_store


@click.group()
def store() -> None:
    """Copy a whole store to another database."""


@store.command(short_help="Copy a store, such as a SQLite file to PostgreSQL.")
@click.argument("source", metavar="SOURCE_URL")
@click.argument("target", metavar="TARGET_URL")
@JSON
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy the store at SOURCE_URL to the empty database at TARGET_URL, and compare both.

    Each is a database URL, or the path of a SQLite file. Others can see the arguments of a command, so write no
    password into a URL: PostgreSQL's is read from the file that PGPASSFILE names. Every table is copied with its ids,
    and read again in the copy: number of rows and content must be the same. Run the command again to continue a copy
    that was interrupted.

    Workers must not hold jobs in the source, and nothing can be written to it during the copy. Files in PERSYN_HOME are
    not copied: use the same folder with the copy.

    \b
    persyn store copy persyn-data/persyn.db postgresql+psycopg://me@db.internal/persyn
    """
    with Meter() as meter:

        def progress(what: str, total: int, done: int, table: str) -> None:
            meter.show(what, total, done, table)

        copied = copy_store(source, target, progress=progress)
    if as_json:
        click.echo(msgspec.json.encode(copied).decode())
        return
    rows = [(name, count) for name, count in copied.rows.items() if count]
    show(("table", "rows"), rows, as_json=False, separators=True)
    url = copied.target.replace(":***@", "@")
    password = "" if url == copied.target else " with its password"
    click.echo(
        f"{sum(copied.rows.values()):,} rows are in both stores, with the same content\n"
        f"to use the copy: PERSYN_DATABASE_URL={url}{password}, and the same PERSYN_HOME\n"
        "the source is unchanged; work in only one of the two from now on, or prompts are answered twice"
    )
