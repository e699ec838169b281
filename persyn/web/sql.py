"""The SQL page: run one query and show its answer as a table or CSV."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from persyn.analysis import listing
from persyn.errors import PersynError, UsageError
from persyn.sql import saved, tokens
from persyn.sql.ask import Answer, Limits, ask, write_csv
from persyn.sql.saved import SavedQuery
from persyn.web import schema
from persyn.web.pages import Problem, not_found, page
from persyn.web.store import database, reading

_PAGE = Limits(rows=500, seconds=10, megabytes=4)
_FILE = Limits(rows=100_000, seconds=60, megabytes=64)
#: Concurrent queries, each in its own process, and how many others may wait for their turn and for how long. Waiting
#: requests occupy threads that pages need too.
_AT_ONCE, _MOST_WAITING, _WAIT_SECONDS = 2, 6, 5.0

_MOST_RUNS = 50

_free = threading.Semaphore(_AT_ONCE)
_places = threading.Semaphore(_AT_ONCE + _MOST_WAITING)


@dataclass(frozen=True, slots=True)
class QueryForm:
    """A requested statement with its parameter values; "" where one is missing."""

    query: str
    given: dict[str, str]
    #: The saved query, if one was selected.
    question: SavedQuery | None

    @property
    def lacking(self) -> list[str]:
        """Parameters without a value."""
        return [name for name, value in self.given.items() if not value]


def show(request: Request) -> Response:
    """Show the query, and its answer if it was run."""
    with reading(request) as session:
        runs = [run.name for run in listing.runs(session, limit=_MOST_RUNS)]
    form = _read(request, newest=runs[0] if runs else "")
    answer, error, seconds = None, None, 0.0
    if form.query and not form.lacking and not _is_foreign(request):
        began = time.monotonic()
        try:
            if form.question is not None:
                with reading(request) as session:
                    saved.require_there(session, form.given)
            answer = _answer(request, form, _PAGE)
        except PersynError as refused:
            error = str(refused)
        seconds = time.monotonic() - began
    return page(
        request,
        "sql.html",
        form=form,
        book={asker: [each for each in saved.queries().values() if each.asker == asker] for asker in saved.ASKERS},
        runs=runs,
        schema=schema.read(database(request)),
        answer=answer,
        error=error,
        seconds=seconds,
        limits=_PAGE,
        most=_FILE.rows,
    )


def download(request: Request) -> Response:
    """Serve the answer as a CSV file."""
    form = _read(request)
    if not form.query or form.lacking:
        lacks = f"Give a value for {', '.join(form.lacking)}." if form.lacking else "Enter a query first."
        raise Problem(HTTPStatus.BAD_REQUEST, "No query", lacks)
    if _is_foreign(request):
        raise Problem(HTTPStatus.FORBIDDEN, "Request from another site", "Run it on the SQL page.")
    try:
        answer = _answer(request, form, _FILE)
    except PersynError as refused:
        raise Problem(HTTPStatus.BAD_REQUEST, "The query failed", f"{refused}.") from refused
    written = io.StringIO()
    write_csv(written, answer.columns, answer.rows)
    name = "answer-cut.csv" if answer.is_truncated else "answer.csv"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(written.getvalue(), media_type="text/csv; charset=utf-8", headers=headers)


def _read(request: Request, *, newest: str = "") -> QueryForm:
    """Parse the request; a saved query without a run defaults to the newest one."""
    query, question = request.query_params.get("query", "").strip(), None
    if chosen := request.query_params.get("question"):
        try:
            question = saved.find(chosen)
        except UsageError as error:
            raise not_found("There is no such saved query.") from error
        query = question.sql
    given = {name: request.query_params.get(name, "").strip() for name in tokens.parameters(query)}
    if question and not given.get("run", "-"):
        given["run"] = newest
    return QueryForm(query, given, question)


def _is_foreign(request: Request) -> bool:
    """Whether a link on another site led here: it fills in the form without running the query."""
    return request.headers.get("sec-fetch-site") in ("cross-site", "same-site")


def _answer(request: Request, form: QueryForm, limits: Limits) -> Answer:
    with _turn():
        return ask(database(request), form.query, form.given, limits)


@contextmanager
def _turn() -> Iterator[None]:
    with ExitStack() as taken:
        for semaphore, seconds in ((_places, 0.0), (_free, _WAIT_SECONDS)):
            if not semaphore.acquire(timeout=seconds):
                raise Problem(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    "Other queries are running",
                    "Try again when they have finished.",
                )
            taken.callback(semaphore.release)
        yield
