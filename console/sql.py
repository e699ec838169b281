"""The SQL page: one question to the store, its answer as a table or as CSV."""

from __future__ import annotations

import csv
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from console.pages import Problem, page
from console.store import database
from persyn.errors import UsageError
from persyn.questions.ask import Answer, Limits, ask

_PAGE = Limits(rows=500, seconds=10, megabytes=4)
_FILE = Limits(rows=100_000, seconds=60, megabytes=64)
#: Questions at a time, each in a process of its own, and how long others wait for their turn.
_AT_ONCE, _WAIT_SECONDS = 2, 5.0

_free = threading.Semaphore(_AT_ONCE)


def show(request: Request) -> Response:
    """The question, and its answer where there is one."""
    query = request.query_params.get("query", "").strip()
    answer, error, seconds = None, None, 0.0
    if query and not _is_foreign(request):
        began = time.monotonic()
        try:
            answer = _asked(request, query, _PAGE)
        except UsageError as refused:
            error = str(refused)
        seconds = time.monotonic() - began
    return page(
        request, "sql.html", query=query, answer=answer, error=error, seconds=seconds, limits=_PAGE, most=_FILE.rows
    )


def download(request: Request) -> Response:
    """The answer as a CSV file."""
    query = request.query_params.get("query", "").strip()
    if not query:
        raise Problem(HTTPStatus.BAD_REQUEST, "Nothing was asked", "Write a question on the SQL page first.")
    if _is_foreign(request):
        raise Problem(HTTPStatus.FORBIDDEN, "Another site asked for this", "Ask it on the SQL page.")
    try:
        answer = _asked(request, query, _FILE)
    except UsageError as refused:
        raise Problem(HTTPStatus.BAD_REQUEST, "The question has no answer", f"{refused}.") from refused
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(answer.columns)
    lines.writerows(answer.rows)
    name = "answer-cut.csv" if answer.is_truncated else "answer.csv"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(written.getvalue(), media_type="text/csv; charset=utf-8", headers=headers)


def _is_foreign(request: Request) -> bool:
    """Whether a link of another site led here: it fills the form in, and asks nothing."""
    return request.headers.get("sec-fetch-site") in ("cross-site", "same-site")


def _asked(request: Request, query: str, limits: Limits) -> Answer:
    with _turn():
        return ask(database(request), query, limits=limits)


@contextmanager
def _turn() -> Iterator[None]:
    if not _free.acquire(timeout=_WAIT_SECONDS):
        raise Problem(HTTPStatus.TOO_MANY_REQUESTS, "Others are asking", "Try again when their questions are answered.")
    try:
        yield
    finally:
        _free.release()
