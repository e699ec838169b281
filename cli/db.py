"""`persyn db`: create, upgrade and check the store's schema."""

from __future__ import annotations

import click

from persyn.db.connect import Database
from persyn.settings import Settings


@click.group()
def db() -> None:
    """Create or upgrade the store, and show its revision."""


@db.command(short_help="Create the store, or upgrade it to this revision.")
def upgrade() -> None:
    """Upgrade the store to the revision this PerSyn needs; a missing store is created."""
    settings = Settings.from_environment()
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    before = database.revision()
    database.upgrade()
    after = database.revision()
    was = "empty" if before is None else f"at {before}"
    click.echo(f"the store is at revision {after}" + ("" if before == after else f" (it was {was})"))
    database.close()


@db.command()
def current() -> None:
    """Show the store's revision."""
    database = Database(Settings.from_environment().database_url)
    click.echo(database.revision() or "empty: run 'persyn db upgrade'")
    database.close()


@db.command()
def check() -> None:
    """Check that the store is at the revision this PerSyn needs."""
    database = Database(Settings.from_environment().database_url)
    database.require_head()
    click.echo(f"the store is at revision {database.revision()}, as needed")
    database.close()
