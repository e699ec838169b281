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
from workers.worker import Listener

_LINE_SECONDS = 10.0


@contextmanager
def counting_rows() -> Iterator[Callable[[int], None]]:
    """A counter of prompt rows on the terminal, while files are read; yields what to call with the number so far."""
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} prompt rows"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task_id = bar.add_task("rows", total=None)
        yield lambda rows: bar.update(task_id, completed=rows)


class Bars(Listener):
    """Shows the stages of one run as they are worked."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        self._console = Console(stderr=True)
        self._is_terminal = self._console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._warned: set[str] = set()
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
            console=self._console,
            disable=not self._is_terminal,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def loading(self, spec: ModelSpec) -> None:
        """A model begins to load."""
        if spec.model:
            self._say(f"loading {spec.model} ({spec.engine})")

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """It is in memory."""
        if spec.model:
            self._say(f"loaded in {seconds:.1f} s")

    def saved(self, stage: str, done: int, failed: int) -> None:
        """So many rows more are written."""
        task_id = self._task(stage, done, failed)
        task = self._progress.tasks[task_id]
        failures = task.fields["failed"] + failed
        rate = f"{task.speed:.1f}/s" if task.speed else ""
        self._progress.update(
            task_id, advance=done + failed, failed=failures, rate=rate, note=f"{failures} failed" if failures else ""
        )
        is_complete = task.finished
        if not self._is_terminal and (is_complete or time.monotonic() - self._said_at > _LINE_SECONDS):
            self._line(stage, task_id)

    def look(self) -> RunState:
        """Show what the store says of the run's present stage; returns the run's state."""
        with self._database.read() as session:
            run = session.get_one(Run, self._run_id)
            counts = pipeline.STAGES[run.stage].progress(session, run)
        if run.stage not in self._tasks:
            self._task(run.stage, 0, 0)
        task = self._progress.tasks[self._tasks[run.stage]]
        failed = counts.failed - task.fields["failed"]
        done = int(counts.done + counts.failed - task.completed) - failed
        if done or failed:
            self.saved(run.stage, done, failed)
        return run.state

    def warn(self, texts: Iterable[str]) -> None:
        """Say each of these once."""
        for text in texts:
            if text not in self._warned:
                self._warned.add(text)
                self._say(text)

    def _task(self, stage: str, done: int, failed: int) -> TaskID:
        """The stage's bar, made at its first rows, which the store counts already."""
        if stage not in self._tasks:
            with self._database.read() as session:
                counts = pipeline.STAGES[stage].progress(session, session.get_one(Run, self._run_id))
            before = counts.done + counts.failed - done - failed
            self._tasks[stage] = self._progress.add_task(
                stage, total=counts.total, completed=before, failed=counts.failed - failed, rate="", note=""
            )
        return self._tasks[stage]

    def _line(self, stage: str, task_id: TaskID) -> None:
        self._said_at = time.monotonic()
        task = self._progress.tasks[task_id]
        left = f", ETA {task.time_remaining:.0f} s" if task.time_remaining else ""
        rate = f", {task.speed:.1f}/s" if task.speed else ""
        failed = f", {task.fields['failed']} failed" if task.fields["failed"] else ""
        click.echo(f"{stage}: {task.completed:.0f} of {task.total:.0f}{rate}{left}{failed}", err=True)

    def _say(self, text: str) -> None:
        if self._is_terminal:
            self._progress.console.print(text, style="dim", markup=False, highlight=False)
        else:
            click.echo(text, err=True)
