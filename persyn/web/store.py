"""Give pages access to the store in short snapshots, and handle database outages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.errors import shorten
from persyn.web.count_cache import CountCache, Counted, CountQuery
from persyn.web.pages import Problem, not_found

log = logging.getLogger(__name__)

#: Raised while the database is unavailable; any other exception is an error of the console.
STORE_ERRORS: tuple[type[Exception], ...] = (OperationalError, InterfaceError, TimeoutError)


@contextmanager
def reading(request: Request) -> Iterator[Session]:
    """A read-only session."""
    with database(request).read() as session:
        yield session


def database(request: Request) -> Database:
    """The console's store."""
    return cast(Database, request.app.state.database)


def counted(request: Request, run_id: int, **counts: Callable[[Session, Run], Any]) -> dict[str, Counted[Any] | None]:
    """Cached counts of a run by name; None where the first is still being computed."""
    return cache_of(request).get({name: _of(run_id, count) for name, count in counts.items()}, run_id=run_id)


def cache_of(request: Request) -> CountCache:
    """The console's cache of counts."""
    return cast(CountCache, request.app.state.cache)


def _of(run_id: int, count: Callable[[Session, Run], Any]) -> CountQuery:
    return lambda session: count(session, session.get_one(Run, run_id))


def find(session: Session, request: Request) -> Run:
    """The run named in the URL; raise `Problem` when there is none."""
    name = request.path_params["run"]
    run = session.scalars(select(Run).where(Run.name == name)).one_or_none()
    if run is None:
        raise not_found(f"There is no run named {name}.")
    return run


def explain_unavailable(request: Request, error: Exception) -> Response:
    """The page shown when the database is unavailable or times out."""
    log.warning("the database does not answer: %s", shorten(str(getattr(error, "orig", None) or error)))
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The database does not answer",
        "The console continues when it is available again; workers wait for it, too. 'persyn doctor' checks it.",
    ).response()
