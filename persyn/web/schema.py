"""Read the store's schema for the SQL page: views and tables with their columns."""

from __future__ import annotations

from threading import Lock
from typing import TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import inspect

from persyn.db import Base
from persyn.db.connect import Database

Schema: TypeAlias = dict[str, list[str]]
"""Columns by view or table, views first, each group in alphabetical order."""

_lock = Lock()
_read: WeakKeyDictionary[Database, Schema] = WeakKeyDictionary()


def read(database: Database) -> Schema:
    """Read the schema of a store once; it changes only with a migration, which requires a restart of the console."""
    with _lock:
        found = _read.get(database)
        if found is None:
            seen = inspect(database.engine)
            views = {view: [each["name"] for each in seen.get_columns(view)] for view in sorted(seen.get_view_names())}
            tables = sorted(Base.metadata.tables.values(), key=lambda table: table.name)
            found = _read[database] = views | {table.name: [each.name for each in table.columns] for table in tables}
    return found
