"""Watch a run that is worked elsewhere: a live view on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text
from sqlalchemy.exc import OperationalError

from persyn.analysis.watch import (
    IDLE,
    Failures,
    HeldJob,
    RowCounts,
    Snapshot,
    TeacherRate,
    count_rows,
    finished_rows,
    snapshot,
)
from persyn.cli.context import cell
from persyn.cli.progress import Meter, span, wait_line
from persyn.cli.table import FittedTable
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.errors import shorten
from persyn.jobs import owner
from persyn.stages.batch import Progress

#: Interval between snapshots on a terminal.
LOOK_SECONDS = 1.0
#: Warnings are checked once per this many snapshots.
_LOOKS_A_WARNING = 15
#: Counting rows may take at most one part in this many of the time.
_COUNTING_SHARE = 10
#: The number of workers and kinds of failures listed.
_MOST = 12


def nobody_works(name: str) -> str:
    """What a reader of an idle run can do."""
    return f"no worker holds a job of the run; start workers, or continue it here: persyn run resume {name}"


class View:
    """Takes snapshots of a run periodically, and shows them.

    interval: seconds between two snapshots, and between two lines.
    warnings: called from time to time for warnings; each is printed once.
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
        self._idle_since: datetime | None = None
        #: Whether no worker has held a job of the run for some seconds.
        self.is_idle = False

    def follow(self, closed: threading.Event) -> Snapshot | None:
        """Show the run until it ends and return the last snapshot; None if `closed` was set first."""
        looks = 0
        with self._meter:
            while not closed.is_set():
                seen = self._look()
                if seen is not None and seen.state is not RunState.RUNNING:
                    self._sum_up()
                    return seen
                looks += 1
                if seen is not None and looks % _LOOKS_A_WARNING == 0:
                    with contextlib.suppress(OperationalError):  # the next snapshot reports it
                        self._say_once(self._warnings())
                closed.wait(self._interval)
        return None

    def _look(self) -> Snapshot | None:
        """Take a snapshot; None if the database does not respond, which is reported once."""
        try:
            with self._database.read() as session:
                run = session.get_one(Run, self._run_id)
                seen, name = snapshot(session, run), run.name
        except OperationalError as error:
            if not self._is_away:
                reason = shorten(str(error.orig))
                self._meter.say(
                    f"the database does not answer ({reason}); waiting for it. The run may continue in the meantime"
                )
            self._is_away = True
            return None
        if self._is_away:
            self._meter.say("the database answers again")
        self._is_away = False
        is_over = seen.state is not RunState.RUNNING
        self._idle_since = (self._idle_since or seen.at) if seen.is_idle else None
        self.is_idle = self._idle_since is not None and seen.at - self._idle_since >= IDLE
        if self.is_idle and not self._meter.is_terminal:  # on a terminal, it stands below the bars
            self._say_once([nobody_works(cell(name))])
        self._show(name, seen, self._rows.last() if is_over else self._rows.newest(self._interval))
        return seen

    def _show(self, name: str, seen: Snapshot, counted: RowCounts | None) -> None:
        if counted is not None:
            for stage, counts in counted.stages.items():
                self._bar(stage, counts, seen, counted)
        failures = counted.failures if counted else []
        self._meter.frame(_head(name, seen), _tables(seen, failures))
        self._say_once(
            f"waiting for {wait.model}, whose server is unavailable: {shorten(wait.error)}" for wait in seen.waits
        )
        self._say_once(
            f"an attempt at {_many(trouble.jobs, 'job')} of {seen.stage} failed: {shorten(trouble.error)}"
            for trouble in seen.troubles
        )

    def _bar(self, stage: str, counts: Progress, seen: Snapshot, counted: RowCounts) -> None:
        notes = [f"{counts.failed:,} failed"] if counts.failed else []
        if stage != seen.stage:
            if self._shown.get(stage) != counts:
                self._meter.show(stage, counts.total, counts.done + counts.failed, *notes)
            self._shown[stage] = counts
            return
        if not self._meter.is_terminal:
            notes += _in_words(seen)
        self._meter.show(stage, counts.total, finished_rows(seen, counted), ", ".join(notes), ago=seen.stage_seconds)

    def _sum_up(self) -> None:
        """Print failures at the end if they were not shown in a table."""
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
    """Counts a run's rows in the background, so that the view never waits longer than one interval."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        self._found: RowCounts | None = None
        self._thread: threading.Thread | None = None
        self._count_at = 0.0

    def newest(self, seconds: float) -> RowCounts | None:
        """The latest count available within the given number of seconds."""
        if self._thread is None and time.monotonic() >= self._count_at:
            self._begin()
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None
        return self._found

    def last(self) -> RowCounts | None:
        """A final count that starts now, however long it takes."""
        if self._thread is not None:
            self._thread.join()
        self._begin().join()
        self._thread = None
        return self._found

    def _begin(self) -> threading.Thread:
        # Counting cannot be interrupted; a daemon thread lets the user close the view without waiting.
        self._thread = threading.Thread(target=self._count, name="counting", daemon=True)
        self._thread.start()
        return self._thread

    def _count(self) -> None:
        began = time.monotonic()
        try:
            with self._database.read() as session:
                run = session.get_one(Run, self._run_id)
                found = count_rows(session, run, known=self._behind(run.stage))
        except OperationalError:
            return  # reported by the view
        ended = time.monotonic()
        self._count_at = ended + _COUNTING_SHARE * (ended - began)
        before = self._found
        if before is not None:
            found = found.after(before)
        self._found = found

    def _behind(self, stage: str) -> list[str]:
        """Stages that had no missing rows when they were counted."""
        if self._found is None:
            return []
        return [name for name, counts in self._found.stages.items() if name != stage and not counts.pending]


def _head(name: str, seen: Snapshot) -> Text:
    since = span((seen.at - seen.began).total_seconds())
    jobs = ", ".join(f"{count:,} {state}" for state, count in sorted(seen.jobs.items()))
    return Text(f"run {cell(name)}: {seen.state}, started {since} ago\njobs of {seen.stage}: {jobs or 'none'}")


def _in_words(seen: Snapshot) -> list[str]:
    """Summarise the tables below the bars in a few words."""
    tokens = sum(pace.tokens for pace in seen.paces)
    workers = _many(len({held.worker for held in seen.held}), "worker")
    waits = [f"waiting for {wait.model}" for wait in seen.waits]
    return [*([f"{tokens:,.0f} tokens/s"] if tokens else []), workers, *waits]


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _tables(seen: Snapshot, failures: Sequence[Failures]) -> RenderableType:
    parts: list[RenderableType] = []
    if seen.paces:
        parts += ["", _paces(seen.paces)]
    if seen.held:
        parts += ["", _workers(seen.held)]
    elif seen.is_idle:
        parts += ["", Text("no worker holds a job of this run", style="bold")]
    if seen.waits:
        parts += ["", *(Text(wait_line(wait), style="bold") for wait in seen.waits)]
    if failures:
        parts += ["", _failures(failures)]
    return Group(*parts)


def _paces(paces: Sequence[TeacherRate]) -> FittedTable:
    rows = [(cell(pace.teacher), f"{pace.responses:,.1f}", f"{pace.tokens:,.0f}") for pace in paces]
    return FittedTable(("teacher", "responses/s", "tokens/s"), rows, (False, True, True))


def _workers(held: Sequence[HeldJob]) -> Group:
    rows = [
        (
            owner.short(cell(job.worker)),
            str(job.job),
            cell(job.model),
            f"{job.prompts:,}",
            span(job.seconds),
            f"{job.lease_seconds:.0f} s" if job.lease_seconds > 0 else Text("expired", "bold red"),
        )
        for job in held[:_MOST]
    ]
    columns = ("worker", "job", "model", "prompts", "for", "lease")
    table = FittedTable(columns, rows, (False, True, False, True, True, True))
    more = len(held) - _MOST
    workers = _many(len({job.worker for job in held}), "worker")
    return Group(table, *([Text(f"and {_many(more, 'more job')}; {workers} in all")] if more > 0 else []))


def _failures(failures: Sequence[Failures]) -> FittedTable:
    rows = [(failure.stage, cell(failure.reason), f"{failure.rows:,}") for failure in failures[:_MOST]]
    return FittedTable(("failed in", "reason", "rows"), rows, (False, False, True))
