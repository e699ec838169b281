"""What a person sees while a run works: a bar per stage with rate and ETA, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from persyn import pipeline
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.llm.protocols import ModelSpec
from persyn.stages.batch import Progress as Counts
from workers.worker import Listener

_LINE_SECONDS = 10.0


@contextmanager
def counting_rows() -> Iterator[Callable[[int], None]]:
    """A counter of prompt rows on the terminal, while files are read; yields what to call with the number so far."""
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} prompt rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task_id = bar.add_task("rows", total=None)
        yield lambda rows: bar.update(task_id, completed=rows)


class Meter:
    """A bar for each thing that goes on, with rate and ETA; a line now and then where there is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._said_at = 0.0
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._is_terminal,
        )

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, name: str, total: int, done: int, note: str = "") -> None:
        """So much of it is done; the first time says where it begins."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, completed=done, rate="", note=note)
            return
        task_id = self._tasks[name]
        task = self._progress.tasks[task_id]
        if done < task.completed:
            self._progress.reset(task_id, total=total)
        rate = f"{task.speed:.1f}/s" if task.speed else ""
        self._progress.update(task_id, total=total, completed=done, rate=rate, note=note)
        if not self._is_terminal and (done >= total or time.monotonic() - self._said_at > _LINE_SECONDS):
            self._line(name, task_id, note)

    def say(self, text: str) -> None:
        """Say something between."""
        if self._is_terminal:
            self._progress.console.print(text, style="dim", markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _line(self, name: str, task_id: TaskID, note: str) -> None:
        self._said_at = time.monotonic()
        task = self._progress.tasks[task_id]
        rate = f", {task.speed:.1f}/s" if task.speed else ""
        left = f", ETA {task.time_remaining:.0f} s" if task.time_remaining else ""
        click.echo(f"{name}: {task.completed:.0f} of {task.total:.0f}{rate}{left}{note and ', '}{note}", err=True)


class Bars(Listener):
    """Shows the stages of one run as they are worked."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        self._meter = Meter()
        #: By stage.
        self._counts: dict[str, Counts] = {}
        self._warned: set[str] = set()

    def __enter__(self) -> Bars:
        self._meter.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._meter.__exit__(kind, error, at)

    def loading(self, spec: ModelSpec) -> None:
        """A model begins to load."""
        if spec.model:
            self._meter.say(f"loading {spec.model} ({spec.engine})")

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """It is in memory."""
        if spec.model:
            self._meter.say(f"loaded in {seconds:.1f} s")

    def saved(self, stage: str, done: int, failed: int) -> None:
        """So many rows more are written."""
        if stage not in self._counts:
            # What the store counts has them already.
            found = self._read(stage)
            self._show(stage, Counts(found.total, found.done - done, found.failed - failed))
        before = self._counts[stage]
        self._show(stage, Counts(before.total, before.done + done, before.failed + failed))

    def look(self) -> RunState:
        """Show what the store says of the run's present stage; returns the run's state."""
        with self._database.read() as session:
            run = session.get_one(Run, self._run_id)
            counts = pipeline.STAGES[run.stage].progress(session, run)
        if counts != self._counts.get(run.stage):
            self._show(run.stage, counts)
        return run.state

    def warn(self, texts: Iterable[str]) -> None:
        """Say each of these once."""
        for text in texts:
            if text not in self._warned:
                self._warned.add(text)
                self._meter.say(text)

    def _read(self, stage: str) -> Counts:
        with self._database.read() as session:
            return pipeline.STAGES[stage].progress(session, session.get_one(Run, self._run_id))

    def _show(self, stage: str, counts: Counts) -> None:
        self._counts[stage] = counts
        note = f"{counts.failed} failed" if counts.failed else ""
        self._meter.show(stage, counts.total, counts.done + counts.failed, note)
