"""Show the list of runs, and the progress of one run."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from msgspec import Struct
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from persyn.analysis import listing, spending, summary, watch
from persyn.analysis.compare import Comparison, compare
from persyn.analysis.listing import RunRow
from persyn.analysis.summary import StageFacts, Summary
from persyn.analysis.watch import RowCounts, Snapshot
from persyn.config import load_config
from persyn.db.catalog import Run, RunState, Student
from persyn.errors import UsageError
from persyn.method import learnability
from persyn.runs import scheduling
from persyn.stages.batch import Progress
from persyn.web.count_cache import Counted
from persyn.web.figures import draw
from persyn.web.pages import page
from persyn.web.store import cache_of, counted, find, reading

_MOST_RUNS = 200
#: Refresh intervals of a page with live content, and of a page that still lacks content.
LOOK_SECONDS, SOON_SECONDS = 2.0, 0.5


def index(request: Request) -> Response:
    """List all runs, the newest first."""
    with reading(request) as session:
        found = listing.runs(session, limit=_MOST_RUNS)
    counts = cache_of(request).get({"sizes": listing.sizes, "spending": summary.spending})
    return page(
        request,
        "runs.html",
        runs=found,
        sizes=counts["sizes"].value if counts["sizes"] else {},
        spending=counts["spending"].value if counts["spending"] else {},
        shares={run.name: _share_done(request, run) for run in found},
        most=_MOST_RUNS,
    )


def _share_done(request: Request, run: RunRow) -> float | None:
    """The share of rows done in a run's current stage; None for a stopped run, or while rows are being counted."""
    if run.state is not RunState.RUNNING:
        return 1.0 if run.state is RunState.DONE else None
    tally = counted(request, run.id, tally=watch.count_rows)["tally"]
    counts = tally.value.stages.get(run.stage) if tally else None
    if counts is None:
        return None
    return (counts.done + counts.failed) / counts.total if counts.total else 1.0


def redirect_login(request: Request) -> Response:
    """Redirect a login link that is no longer needed."""
    return RedirectResponse("/", HTTPStatus.SEE_OTHER)


def show(request: Request) -> Response:
    """Show one run: its progress and its results so far."""
    with reading(request) as session:
        run = find(session, request)
        student = None if run.student_id is None else session.get_one(Student, run.student_id)
        seen = watch.snapshot(session, run)
    counts = counted(
        request,
        run.id,
        tally=watch.count_rows,
        facts=summary.facts,
        costs=spending.facts,
        compared=_compared,
        figures=draw,
    )
    is_going = run.state is RunState.RUNNING
    return page(
        request,
        "run.html",
        run=run,
        student=student,
        seen=seen,
        stages=_stages(seen, counts["tally"], counts["facts"]),
        live=is_live(request, is_going, *counts.values()),
        is_going=is_going,
        how_to_continue=scheduling.how_to_continue(run),
        unit=None if run.learnability_scorer_id is None else _unit(run),
        **counts,
    )


def _unit(run: Run) -> str:
    config = load_config(run.config).run
    return learnability.unit(config.learnability, per=config.learnability_per, on=config.learnability_on)


def is_live(request: Request, is_going: bool, *counts: Counted[Any] | None) -> float | None:
    """Seconds until the page refreshes itself; None if nothing can change, or the user turned it off.

    counts: the counts it shows, or lacks.
    """
    if request.query_params.get("live") == "off":
        return None
    if None in counts:
        return SOON_SECONDS
    return LOOK_SECONDS if is_going or any(count is not None and count.is_old for count in counts) else None


class StageRow(Struct, frozen=True):
    """A stage at this moment.

    over:         rows that are done or failed.
    seconds:      elapsed from its first claim to its last end, if known.
    work_seconds: time during which workers held its jobs, summed over workers.
    rate:         rows per second, for the current stage.
    left:         estimated remaining seconds, for the current stage.
    """

    name: str
    counts: Progress
    over: int
    seconds: float | None = None
    rate: float | None = None
    left: float | None = None
    work_seconds: float | None = None


def _stages(seen: Snapshot, tally: Counted[RowCounts] | None, facts: Counted[Summary] | None) -> list[StageRow]:
    if tally is None:
        return []
    took = {stage.stage: stage for stage in facts.value.stages} if facts else {}
    return [_stage(name, seen, tally.value, took.get(name)) for name in tally.value.stages]


def _stage(name: str, seen: Snapshot, counted: RowCounts, took: StageFacts | None) -> StageRow:
    counts = counted.stages[name]
    elapsed, worked = (took.seconds, took.work_seconds) if took else (None, None)
    if name != seen.stage or seen.state is not RunState.RUNNING:
        return StageRow(name, counts, counts.done + counts.failed, elapsed, work_seconds=worked)
    over = watch.finished_rows(seen, counted)
    rate = watch.rate(seen, counts.total - over)
    left = (counts.total - over) / rate if rate else None
    return StageRow(name, counts, over, seen.stage_seconds, rate, left, worked)


def _compared(session: Session, run: Run) -> Comparison | str:
    """The comparison of strategies, or the reason why there is none."""
    try:
        return compare(session, run)
    except UsageError as error:
        return str(error)
