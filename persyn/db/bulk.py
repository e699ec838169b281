"""Write and find many rows in one statement; an insert skips rows that exist already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import ARRAY, ColumnElement, Float, Select, any_, bindparam, func, literal, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session

from persyn.db.base import Base


def insert_new(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows and skip those that violate a unique key, so that repeating an insert has no effect.

    All rows have the keys of the first. They are passed to the driver as one list of parameters, about 30 times faster
    than row by row; PostgreSQL, whose driver would send these one by one, gets an array for each column.
    """
    if not rows:
        return
    if _is_sqlite(session):
        session.connection().execute(_insert_new(session, model), rows)
        return
    names = tuple(rows[0])
    arrays = {_array(name): _values(model, name, rows) for name in names}
    session.connection().execute(_insert_arrays(model, names), arrays)


def insert_found(session: Session, model: type[Base], columns: Sequence[str], rows: Select[*tuple[Any, ...]]) -> None:
    """Insert the result of a query like `insert_new`, without moving rows out of the database."""
    # In SQLite's grammar, ON CONFLICT may follow a SELECT only if the SELECT has a WHERE clause.
    session.execute(_insert_new(session, model).from_select(list(columns), rows.where(true())))


def among(session: Session, column: InstrumentedAttribute[str], values: Iterable[str]) -> ColumnElement[bool]:
    """Whether a column has one of many values: one parameter, where `in_` would make a statement with one for each."""
    if _is_sqlite(session):
        listed = func.json_each(msgspec.json.encode(list(values)).decode()).table_valued("value")
        return column.in_(select(listed.c.value))
    return column == any_(literal(list(values), ARRAY(column.type)))


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def _insert_new(session: Session, model: type[Base]) -> Any:
    if _is_sqlite(session):
        return sqlite.insert(model).on_conflict_do_nothing()
    return postgresql.insert(model).on_conflict_do_nothing()


@lru_cache
def _insert_arrays(model: type[Base], names: tuple[str, ...]) -> Any:
    """An insert of rows given as one array for each column."""
    table = model.__table__
    arrays = (bindparam(_array(name), type_=ARRAY(table.c[name].type, dimensions=1)) for name in names)
    rows = select(*map(func.unnest, arrays))
    return postgresql.insert(model).from_select(list(names), rows).on_conflict_do_nothing()


def _values(model: type[Base], name: str, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """A column of rows; the driver takes no list of integers and floats together."""
    values = [row[name] for row in rows]
    if isinstance(model.__table__.c[name].type, Float):
        return [None if value is None else float(value) for value in values]
    return values


def _array(name: str) -> str:
    """The parameter with a column's values; the column's own name is taken."""
    return f"each_{name}"
