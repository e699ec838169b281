"""Show the progress of a run: a bar per stage with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from persyn.analysis.watch import ServerWait
from persyn.cli.context import plain
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.time import now
from persyn.errors import shorten
from persyn.llm.protocols import ModelSpec
from persyn.stages.batch import Progress as Counts
from persyn.workers.runner.listener import Counter

#: Interval between lines without a terminal.
LINE_SECONDS = 10.0
#: Terminals with at least this many columns show a long bar.
_WIDE = 100


@contextmanager
def counting_rows() -> Iterator[Callable[[int], None]]:
    """Show a counter of prompt rows while files are read; yields a function to call with the current number."""
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} prompt rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task_id = bar.add_task("rows", total=None)
        yield lambda rows: bar.update(task_id, completed=rows)


class _Framed(Progress):
    """Progress bars with content above and below."""

    above: RenderableType | None = None
    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The content from top to bottom."""
        frame = self.above, self.make_tasks_table(self.tasks), self.below
        return [part for part in frame if part is not None]


class Meter:
    """A progress bar per task with rate and ETA; periodic lines where there is no terminal.

    console:      where it is shown; None means standard error.
    line_seconds: interval between lines.
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
        """Whether bars are shown, and not lines."""
        return self.console.is_terminal

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, name: str, total: int, done: int, note: str = "", *, ago: float = 0.0) -> None:
        """Update a task's progress; the first call creates it, started `ago` seconds earlier."""
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
        """Show content above and below the bars; ignored without a terminal."""
        self._progress.above, self._progress.below = above, below

    def say(self, text: str) -> None:
        """Print a message between the bars."""
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _line(self, task: Task, note: str) -> None:
        counts = f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
        line = ", ".join(part for part in (counts, _rate(task), _left(task), note) if part)
        if line != self._said:
            self._said_at, self._said = time.monotonic(), line
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars(Counter):
    """Shows the progress of one run's stages while they are worked."""

    def __init__(self, database: Database, run_id: int) -> None:
        super().__init__(database, run_id)
        self._meter = Meter()
        #: The models at work: whether each is loaded yet.
        self._models: dict[str, bool] = {}
        self._heard_at = time.monotonic()
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
        """Announce that a model is being loaded."""
        self._hear(spec, is_loaded=False)
        if spec.model:
            self._meter.say(f"loading {spec.model} ({spec.engine})")

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """Announce that the model is loaded."""
        self._hear(spec, is_loaded=True)
        if spec.model:
            self._meter.say(f"loaded {spec.model} in {seconds:.1f} s")

    def idle(self, spec: ModelSpec) -> None:
        """No longer wait for results of a model."""
        super().idle(spec)
        self._heard_at = time.monotonic()
        self._models = {model: is_loaded for model, is_loaded in self._models.items() if model != _name(spec)}

    def saved(self, stage: str, done: int, failed: int) -> None:
        """Count rows that were stored."""
        self._heard_at = time.monotonic()
        super().saved(stage, done, failed)

    def _hear(self, spec: ModelSpec, *, is_loaded: bool) -> None:
        # Replaced rather than changed: several workers report, and another thread reads.
        self._heard_at, self._models = time.monotonic(), {**self._models, _name(spec): is_loaded}

    def _say_on(self) -> None:
        """Print the current activity periodically while there are no events."""
        said_at = time.monotonic()
        while not self._over.wait(0.5):
            silent = time.monotonic() - max(self._heard_at, said_at)
            if silent >= LINE_SECONDS and (doing := _doing(self._models)):
                said_at = time.monotonic()
                self._meter.say(f"{doing}, {said_at - self._heard_at:.0f} s so far ...")

    def waiting(self, reason: str) -> None:
        """Announce that a server is unavailable and will be retried."""
        with self._database.read() as session:
            run = session.get_one(Run, self._run_id)
            found = watch.waits(session, run, session.scalars(select(now())).one())
        for wait in found:
            self._meter.say(wait_line(wait))

    def counted(self, stage: str, counts: Counts) -> None:
        """Show the counts of a stage."""
        note = f"{counts.failed} failed" if counts.failed else ""
        self._meter.show(stage, counts.total, counts.done + counts.failed, note)


def _name(spec: ModelSpec) -> str:
    return spec.model or spec.engine


def _doing(models: Mapping[str, bool]) -> str:
    """What the models are waited for; empty without models."""
    kinds = {"loading": False, "waiting for results of": True}
    found = {
        what: [name for name, loaded in models.items() if loaded is is_loaded] for what, is_loaded in kinds.items()
    }
    return "; ".join(f"{what} {', '.join(names)}" for what, names in found.items() if names)


def _rate(task: Task) -> str:
    return f"{task.speed:.1f}/s" if task.speed and not task.finished else ""


def _left(task: Task) -> str:
    if task.finished_time is not None:
        return f"in {span(task.finished_time)}" if task.finished_time >= 1 else ""
    return f"ETA {span(task.time_remaining)}" if task.time_remaining else ""


def span(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, with days if needed."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))


def wait_line(wait: ServerWait) -> str:
    """Say which server the run waits for, since when, and until when."""
    return (
        f"waiting for {plain(wait.model)}, {span(wait.seconds)} so far; next attempt in {span(wait.retry_seconds)}; "
        f"the run fails after {span(wait.limit_seconds)} (outage_seconds): {plain(shorten(wait.error))}"
    )
