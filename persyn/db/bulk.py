"""Insert many rows in one statement, skipping rows that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from persyn.db.base import Base


def insert_new(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows and skip those that violate a unique key, so that repeating an insert has no effect.

    The rows are passed to the driver as one list of parameters, about 30 times faster than row by row.
    """
    if rows:
        session.connection().execute(_insert_new(session, model), rows)


def insert_found(session: Session, model: type[Base], columns: Sequence[str], rows: Select[*tuple[Any, ...]]) -> None:
    """Insert the result of a query like `insert_new`, without moving rows out of the database."""
    # In SQLite's grammar, ON CONFLICT may follow a SELECT only if the SELECT has a WHERE clause.
    session.execute(_insert_new(session, model).from_select(list(columns), rows.where(true())))


def _insert_new(session: Session, model: type[Base]) -> Any:
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(model).on_conflict_do_nothing()
    return postgresql.insert(model).on_conflict_do_nothing()
