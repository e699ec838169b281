"""Run the migrations, on a given connection or on the database of the settings."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from persyn.db import Base
from persyn.db.connect import Database
from persyn.settings import Settings


def migrate(connection: Connection) -> None:
    """Migrate to the requested revision; SQLite, which lacks most ALTERs, copies tables instead."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Find the connection and migrate."""
    given = context.config.attributes.get("connection")
    if given is not None:
        migrate(given)
        return
    with Database(Settings.from_environment().database_url).engine.begin() as connection:
        migrate(connection)


main()
