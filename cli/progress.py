"""What a person sees while a run works: a bar per stage with rate and ETA, or plain lines without a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from sqlalchemy import select

from persyn.analysis import watch
from persyn.analysis.watch import Wait
from persyn.cli.open import plain
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.time import now
from persyn.errors import shorten
from persyn.llm.protocols import ModelSpec
from persyn.stages.batch import Progress as Counts
from persyn.workers.runner.listener import Counter

#: Between two lines where there is no terminal.
LINE_SECONDS = 10.0
#: A line of so many columns has room for a long bar.
_WIDE = 100


@contextmanager
def counting_rows() -> Iterator[Callable[[int], None]]:
    """A counter of prompt rows on the terminal, while files are read; yields what to call with the number so far."""
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} prompt rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task_id = bar.add_task("rows", total=None)
        yield lambda rows: bar.update(task_id, completed=rows)


class _Framed(Progress):
    """Bars with something above and below."""

    above: RenderableType | None = None
    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """All of it, from the top."""
        frame = self.above, self.make_tasks_table(self.tasks), self.below
        return [part for part in frame if part is not None]


class Meter:
    """A bar for each thing that goes on, with rate and ETA; a line now and then where there is no terminal.

    console:      where it is shown; standard error, if none is given.
    line_seconds: between two lines.
    """

    def __init__(self, console: Console | None = None, *, line_seconds: float = LINE_SECONDS) -> None:
        self.console = console or Console(stderr=True)
        self._line_seconds = line_seconds
        self._tasks: dict[str, TaskID] = {}
        self._said_at = 0.0
        self._said = ""
        self._progress = _Framed(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24 if self.console.width >= _WIDE else 12),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}", justify="right"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.is_terminal,
        )

    @property
    def is_terminal(self) -> bool:
        """Whether there are bars, and not lines."""
        return self.console.is_terminal

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, name: str, total: int, done: int, note: str = "", *, ago: float = 0.0) -> None:
        """So much of it is done; the first time says where it begins, and how many seconds ago it began."""
        if name not in self._tasks:
            task_id = self._progress.add_task(name, total=total, completed=done, rate="", left="", note=note)
            self._tasks[name] = task_id
            self._progress.tasks[task_id].start_time = self._progress.get_time() - ago
            if not self.is_terminal:
                self._line(self._progress.tasks[task_id], note)
            return
        task_id = self._tasks[name]
        task = self._progress.tasks[task_id]
        if done < task.completed:
            self._progress.reset(task_id, total=total)
        self._progress.update(task_id, total=total, completed=done, note=note)
        self._progress.update(task_id, rate=_rate(task), left=_left(task))
        if not self.is_terminal and (done >= total or time.monotonic() - self._said_at > self._line_seconds):
            self._line(task, note)

    def frame(self, above: RenderableType | None, below: RenderableType | None) -> None:
        """Put something above and below the bars; lines have no such thing."""
        self._progress.above, self._progress.below = above, below

    def say(self, text: str) -> None:
        """Say something between."""
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _line(self, task: Task, note: str) -> None:
        counts = f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
        line = ", ".join(part for part in (counts, _rate(task), _left(task), note) if part)
        if line != self._said:
            self._said_at, self._said = time.monotonic(), line
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars(Counter):
    """Shows the stages of one run as they are worked."""

    def __init__(self, database: Database, run_id: int) -> None:
        super().__init__(database, run_id)
        self._meter = Meter()
        #: What goes on, and since when nothing was heard of it.
        self._doing, self._heard_at = "", time.monotonic()
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._say_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Bars:
        self._meter.__enter__()
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._beat.join()
        self._meter.__exit__(kind, error, at)

    def loading(self, spec: ModelSpec) -> None:
        """A model begins to load."""
        self._hear(f"loading {spec.model or spec.engine}")
        if spec.model:
            self._meter.say(f"loading {spec.model} ({spec.engine})")

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """It is in memory."""
        self._hear(f"waiting for results of {spec.model or spec.engine}")
        if spec.model:
            self._meter.say(f"loaded in {seconds:.1f} s")

    def saved(self, stage: str, done: int, failed: int) -> None:
        """So many rows more are written."""
        self._hear(self._doing)
        super().saved(stage, done, failed)

    def _hear(self, doing: str) -> None:
        self._doing, self._heard_at = doing, time.monotonic()

    def _say_on(self) -> None:
        """Say now and then what goes on while nothing else is heard."""
        said_at = time.monotonic()
        while not self._over.wait(0.5):
            silent = time.monotonic() - max(self._heard_at, said_at)
            if silent >= LINE_SECONDS and self._doing:
                said_at = time.monotonic()
                self._meter.say(f"{self._doing}, {said_at - self._heard_at:.0f} s so far ...")

    def waiting(self, reason: str) -> None:
        """A server is away, and is asked again later."""
        with self._database.read() as session:
            run = session.get_one(Run, self._run_id)
            found = watch.waits(session, run, session.scalars(select(now())).one())
        for wait in found:
            self._meter.say(wait_line(wait))

    def counted(self, stage: str, counts: Counts) -> None:
        """Show the counts of a stage."""
        note = f"{counts.failed} failed" if counts.failed else ""
        self._meter.show(stage, counts.total, counts.done + counts.failed, note)


def _rate(task: Task) -> str:
    return f"{task.speed:.1f}/s" if task.speed and not task.finished else ""


def _left(task: Task) -> str:
    if task.finished_time is not None:
        return f"in {span(task.finished_time)}" if task.finished_time >= 1 else ""
    return f"ETA {span(task.time_remaining)}" if task.time_remaining else ""


def span(seconds: float) -> str:
    """A time in hours, minutes and seconds; in days, where there are some."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))


def wait_line(wait: Wait) -> str:
    """What is waited for, since when, and until when."""
    return (
        f"waiting for {plain(wait.model)} since {span(wait.seconds)}; asked again in {span(wait.retry_seconds)}, "
        f"the run fails after {span(wait.limit_seconds)} (outage_seconds): {plain(shorten(wait.error))}"
    )
