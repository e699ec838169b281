"""Show the failures of a run by reason, and retry them."""

from __future__ import annotations

from http import HTTPStatus
from typing import cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from persyn.analysis import listing, watch
from persyn.db.catalog import RunState
from persyn.errors import UsageError
from persyn.runs import pipeline
from persyn.web.pages import Problem, link, page
from persyn.web.runs import is_live
from persyn.web.safety import Access, form
from persyn.web.store import counted, database, find, reading

_MOST = 100


def index(request: Request) -> Response:
    """List failed jobs by error, and failed rows by reason."""
    with reading(request) as session:
        run = find(session, request)
        jobs = listing.failed_jobs(session, run, limit=_MOST)
        needed = pipeline.needed(session, run)
    tally = counted(request, run.id, tally=watch.count_rows)["tally"]
    is_going = run.state is RunState.RUNNING
    return page(
        request,
        "failures.html",
        run=run,
        jobs=jobs,
        tally=tally,
        most=_MOST,
        can_retry=bool(jobs) and run.state is not RunState.DONE,
        asked_again=() if is_going else needed,
        live=is_live(request, is_going, tally),
    )


async def retry(request: Request) -> Response:
    """Retry the run's failed jobs, or the rows that failed for a reason, like `persyn jobs retry`."""
    access = cast(Access, request.app.state.access)
    given = await form(request)
    if access.admin is None:
        raise Problem(HTTPStatus.FORBIDDEN, "This console is read-only", "Start it with --admin to retry failed jobs.")
    if not access.is_form(given.get("form_secret", "")):
        raise Problem(
            HTTPStatus.FORBIDDEN, "The form has expired", "The console was restarted: go back and reload the page."
        )
    await run_in_threadpool(_retry, request, access.admin, given.get("rows"))
    return RedirectResponse(link("runs", request.path_params["run"]), HTTPStatus.SEE_OTHER)


def _retry(request: Request, actor: str, reason: str | None) -> None:
    try:
        with database(request).write() as session:
            run = find(session, request)
            if reason is None:
                pipeline.retry(session, run, actor=actor)
            else:
                pipeline.retry_rows(session, run, [reason], actor=actor)
    except UsageError as error:
        raise Problem(HTTPStatus.CONFLICT, "Nothing to retry", f"{error}.") from error
