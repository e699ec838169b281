"""A run as it is worked elsewhere: a live view on a terminal, a line now and then without one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text
from sqlalchemy.exc import OperationalError

from persyn.analysis.watch import Failures, Glance, Held, Pace, Tally, glance, over, tally
from persyn.cli.open import cell
from persyn.cli.progress import Meter, span, wait_line
from persyn.cli.table import Fitted
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.work import JobState
from persyn.errors import shorten
from persyn.jobs import owner
from persyn.stages.batch import Progress

#: Between two looks on a terminal.
LOOK_SECONDS = 1.0
#: After so many looks it is asked again what should be warned of.
_LOOKS_A_WARNING = 15
#: Rows are counted at most one part in so many of the time.
_COUNTING_SHARE = 10
#: Workers that are shown one by one, and kinds of failures.
_MOST = 12


class View:
    """Looks at a run again and again, and shows what it sees.

    interval: seconds between two looks, and between two lines.
    warnings: asked now and then what a person should know besides; each is said once.
    """

    def __init__(
        self,
        database: Database,
        run_id: int,
        meter: Meter,
        *,
        interval: float,
        warnings: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._database = database
        self._run_id = run_id
        self._meter = meter
        self._interval = interval
        self._warnings = warnings
        self._said: set[str] = set()
        self._rows = _Rows(database, run_id)
        self._shown: dict[str, Progress] = {}
        self._is_away = False

    def follow(self, closed: threading.Event) -> Glance | None:
        """Show the run until it is over, and return what was seen last; None when `closed` came first."""
        looks = 0
        with self._meter:
            while not closed.is_set():
                seen = self._look()
                if seen is not None and seen.state is not RunState.RUNNING:
                    self._sum_up()
                    return seen
                looks += 1
                if seen is not None and looks % _LOOKS_A_WARNING == 0:
                    with contextlib.suppress(OperationalError):  # the next look says so
                        self._say_once(self._warnings())
                closed.wait(self._interval)
        return None

    def _look(self) -> Glance | None:
        """One look; None when the database does not answer, which is said once."""
        try:
            with self._database.read() as session:
                run = session.get_one(Run, self._run_id)
                seen, name = glance(session, run), run.name
        except OperationalError as error:
            if not self._is_away:
                reason = shorten(str(error.orig))
                self._meter.say(f"the database does not answer ({reason}); the run may go on, this window waits")
            self._is_away = True
            return None
        if self._is_away:
            self._meter.say("the database answers again")
        self._is_away = False
        is_over = seen.state is not RunState.RUNNING
        self._show(name, seen, self._rows.last() if is_over else self._rows.newest(self._interval))
        return seen

    def _show(self, name: str, seen: Glance, counted: Tally | None) -> None:
        if counted is not None:
            for stage, counts in counted.stages.items():
                self._bar(stage, counts, seen, counted)
        failures = counted.failures if counted else []
        self._meter.frame(_head(name, seen), _tables(seen, failures))
        self._say_once(f"waiting for {wait.model}, whose server is away: {shorten(wait.error)}" for wait in seen.waits)
        self._say_once(
            f"an attempt at {_many(trouble.jobs, 'job')} of {seen.stage} failed: {shorten(trouble.error)}"
            for trouble in seen.troubles
        )

    def _bar(self, stage: str, counts: Progress, seen: Glance, counted: Tally) -> None:
        notes = [f"{counts.failed:,} failed"] if counts.failed else []
        if stage != seen.stage:
            if self._shown.get(stage) != counts:
                self._meter.show(stage, counts.total, counts.done + counts.failed, *notes)
            self._shown[stage] = counts
            return
        if not self._meter.is_terminal:
            notes += _in_words(seen)
        self._meter.show(stage, counts.total, over(seen, counted), ", ".join(notes), ago=seen.stage_seconds)

    def _sum_up(self) -> None:
        """Where there is no table of what failed, say it at the end."""
        counted = self._rows.newest(0.0)
        if counted is not None and not self._meter.is_terminal:
            for failure in counted.failures:
                self._meter.say(f"{failure.stage}: {failure.rows} failed: {shorten(failure.reason)}")

    def _say_once(self, texts: Iterable[str]) -> None:
        for text in texts:
            if text not in self._said:
                self._said.add(text)
                self._meter.say(text)


class _Rows:
    """A run's rows, counted beside the view: it waits for a count no longer than it would for its next look."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        self._found: Tally | None = None
        self._thread: threading.Thread | None = None
        self._count_at = 0.0

    def newest(self, seconds: float) -> Tally | None:
        """The newest count there is after at most so many seconds."""
        if self._thread is None and time.monotonic() >= self._count_at:
            self._begin()
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None
        return self._found

    def last(self) -> Tally | None:
        """A count that begins now, however long it takes: nothing will change any more."""
        if self._thread is not None:
            self._thread.join()
        self._begin().join()
        self._thread = None
        return self._found

    def _begin(self) -> threading.Thread:
        # A count of many rows cannot be interrupted; whoever closes the window does not wait for it.
        self._thread = threading.Thread(target=self._count, name="counting", daemon=True)
        self._thread.start()
        return self._thread

    def _count(self) -> None:
        began = time.monotonic()
        try:
            with self._database.read() as session:
                run = session.get_one(Run, self._run_id)
                found = tally(session, run, known=self._behind(run.stage))
        except OperationalError:
            return  # the view says so
        ended = time.monotonic()
        self._count_at = ended + _COUNTING_SHARE * (ended - began)
        before = self._found
        if before is not None:
            found = found.after(before)
        self._found = found

    def _behind(self, stage: str) -> list[str]:
        """Stages that were counted when nothing of them was missing any more."""
        if self._found is None:
            return []
        return [name for name, counts in self._found.stages.items() if name != stage and not counts.pending]


def _head(name: str, seen: Glance) -> Text:
    since = span((seen.at - seen.began).total_seconds())
    jobs = ", ".join(f"{count:,} {state}" for state, count in sorted(seen.jobs.items()))
    return Text(f"run {cell(name)}: {seen.state}, begun {since} ago\njobs of {seen.stage}: {jobs or 'none'}")


def _in_words(seen: Glance) -> list[str]:
    """What the tables below the bars say, in a few words."""
    tokens = sum(pace.tokens for pace in seen.paces)
    workers = _many(len({held.worker for held in seen.held}), "worker")
    waits = [f"waiting for {wait.model}" for wait in seen.waits]
    return [*([f"{tokens:,.0f} tokens/s"] if tokens else []), workers, *waits]


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _tables(seen: Glance, failures: Sequence[Failures]) -> RenderableType:
    parts: list[RenderableType] = []
    if seen.paces:
        parts += ["", _paces(seen.paces)]
    if seen.held:
        parts += ["", _workers(seen.held)]
    elif seen.state is RunState.RUNNING and seen.jobs.get(JobState.QUEUED) and not seen.waits:
        parts += ["", Text("no worker holds a job of this run", style="bold")]
    if seen.waits:
        parts += ["", *(Text(wait_line(wait), style="bold") for wait in seen.waits)]
    if failures:
        parts += ["", _failures(failures)]
    return Group(*parts)


def _paces(paces: Sequence[Pace]) -> Fitted:
    rows = [(cell(pace.teacher), f"{pace.responses:,.1f}", f"{pace.tokens:,.0f}") for pace in paces]
    return Fitted(("teacher", "responses/s", "tokens/s"), rows, (False, True, True))


def _workers(held: Sequence[Held]) -> Group:
    rows = [
        (
            owner.short(cell(job.worker)),
            str(job.job),
            cell(job.model),
            f"{job.prompts:,}",
            span(job.seconds),
            f"{job.lease_seconds:.0f} s" if job.lease_seconds > 0 else Text("ran out", "bold red"),
        )
        for job in held[:_MOST]
    ]
    columns = ("worker", "job", "works", "prompts", "for", "lease")
    table = Fitted(columns, rows, (False, True, False, True, True, True))
    more = len(held) - _MOST
    workers = _many(len({job.worker for job in held}), "worker")
    return Group(table, *([Text(f"and {_many(more, 'more job')}; {workers} in all")] if more > 0 else []))


def _failures(failures: Sequence[Failures]) -> Fitted:
    rows = [(failure.stage, cell(failure.reason), f"{failure.rows:,}") for failure in failures[:_MOST]]
    return Fitted(("failed in", "reason", "rows"), rows, (False, False, True))
