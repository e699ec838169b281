"""Edit the definition of a SQLite table in place, which keeps its rows.

SQLite can neither change a constraint nor add or drop a key. To copy the table and drop the old one, as Alembic's batch
mode does, would delete what belongs to its rows wherever foreign keys are on. https://sqlite.org/lang_altertable.html,
section 7.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, text


def edit(connection: Connection, table: str, change: Callable[[str], str]) -> None:
    """Replace the definition of a table, its CREATE TABLE statement, by what `change` makes of it.

    The rows must fit the new definition as they are. Raises `RuntimeError` if nothing changes.
    """
    named = {"table": table}
    definition = text("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = :table")
    was = connection.scalar(definition, named)
    if was is None or (now := change(was)) == was:
        raise RuntimeError(f"the definition of table {table} is not as expected: {was}")
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema=ON")
    written = text("UPDATE sqlite_master SET sql = :now WHERE type = 'table' AND name = :table")
    connection.execute(written, {"now": now, **named})
    connection.exec_driver_sql(f"PRAGMA schema_version={version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema=RESET")
    assert connection.scalar(definition, named) == now
