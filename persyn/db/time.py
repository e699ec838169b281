"""Database time: the server's own clock, always UTC, so that differences between workers' clocks do not matter."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import DateTime, Dialect, TypeDecorator, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC time, also on SQLite, which stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Reject naive times, whose time zone is ambiguous."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a stored time must be aware, got {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Attach UTC to times from SQLite."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class now(FunctionElement[datetime]):
    """The database's time at this statement, plus an offset."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, offset: timedelta = timedelta()) -> None:
        # A parameter, or every statement with a time would be compiled again.
        shift = (literal(f"{offset.total_seconds():+.3f} seconds"),) if offset else ()
        super().__init__(*shift)


@compiles(now, "sqlite")
def _sqlite(element: now, compiler: SQLCompiler, **kwargs: Any) -> str:
    shift = compiler.process(element.clauses, **kwargs)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now'{shift and f', {shift}'}))"


@compiles(now, "postgresql")
def _postgresql(element: now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # now() is the start of the transaction; a lease must not start in the past.
    shift = compiler.process(element.clauses, **kwargs)
    return f"(clock_timestamp(){shift and f' + CAST({shift} AS interval)'})"
