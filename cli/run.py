"""`persyn run`: start, resume, watch, list and cancel runs; its other commands are in `operations`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import msgspec
from rich.console import Console
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.analysis import recalibration, spending
from persyn.analysis.watch import Snapshot, count_rows, effective_state, shortfalls, snapshot, waiting_runs
from persyn.atomic import FolderChanged
from persyn.cli import operations, summary
from persyn.cli.beforehand import look_up, require_fit
from persyn.cli.context import JSON, RUN, find_run, nobody_takes, plain, show, store, warn
from persyn.cli.extend import extend
from persyn.cli.progress import LINE_SECONDS, Bars, Meter, counting_rows
from persyn.cli.recalibrate import recalibrate
from persyn.cli.transport import VALUES, change
from persyn.cli.waiting import waiting
from persyn.cli.watch import LOOK_SECONDS, View, nobody_works
from persyn.dataset import export, manifest
from persyn.db import lookup
from persyn.db.catalog import Run, RunPrompt, RunState
from persyn.db.connect import Database
from persyn.errors import PersynError, UsageError
from persyn.ingest.versions import Identities
from persyn.jobs import owner, workload
from persyn.runs import extension, pipeline, run_file, same_run
from persyn.runs.start import find
from persyn.settings import Settings
from persyn.workers.runner.crew import Crew

#: The exit codes of a finished run in which too many rows failed, and of one that is paused.
EXIT_MANY_FAILED, EXIT_PAUSED = 3, 4


@click.group()
def run() -> None:
    """Start, extend, recalibrate, resume, watch, pause, rename and delete runs."""


for _command in (extend, recalibrate, *operations.OF_RUN):
    run.add_command(_command)


@run.command(short_help="Start a run, or resume it.")
@click.argument("config", type=click.Path(path_type=Path))
def start(config: Path) -> None:
    """Start the run in file CONFIG, execute it and write its dataset; an existing run is continued.

    With PERSYN_BROKER_URL, workers execute the run and this command watches it; the dataset is still written by this
    command. If it is closed before the run ends, write the dataset with 'run resume' or 'export'.

    A run that failed or was cancelled is continued by 'run resume' instead.

    Before a new run is stored, PerSyn checks for what would stop it here: prompts without the fields that the quality
    needs, and missing models, keys, servers, GPUs or memory. Exit 3 when the run is done and more than 5% of a stage's
    rows failed, with the reasons. Exit 4 when the run is paused: if its budget is used up, raise [budget] in the file
    and start it again; if a person has paused it, continue it by 'run resume'.
    """
    wanted = run_file.read(config)
    require_celery()
    with store() as database:
        with waiting("reading the store"), database.read() as session:
            is_new = find(session, wanted) is None
        known: Identities = {}
        if is_new:
            # Identifying models may take minutes, so it happens outside the write transaction.
            known = look_up(wanted)
            require_fit(wanted)
        with counting_rows() as count, waiting("writing the run and its prompts"), database.write() as session:
            run_id = pipeline.start_run(session, wanted, actor=owner.actor(), known=known, on_rows=count, say=warn).id
        if is_new:
            spending.record(database, run_id, is_start=True)
        work(database, run_id)


@run.command(short_help="Resume a run and retry its failed jobs.")
@RUN
def resume(run: str) -> None:
    """Continue RUN and write its dataset at the end; failed and cancelled jobs are retried.

    A run that is done continues if it misses a row, for example because another run retries a response that they share.
    """
    require_celery()
    with store() as database:
        with waiting("writing to the store"), database.write() as session:
            found = find_run(session, run)
            _warn_of_change(session, found)
            pipeline.resume(session, found, actor=owner.actor())
            run_id = found.id
        work(database, run_id)


def _warn_of_change(session: Session, run: Run) -> None:
    """Warn if the files of a run's prompts changed or cannot be compared; the run keeps its prompts."""
    try:
        change = same_run.look(session, run)
    except UsageError as error:
        warn(f"{error}; the run keeps its prompts")
    else:
        if change is not None:
            warn(str(change))


@run.command(short_help="Watch a run until it ends.")
@RUN
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    help=f"Seconds between two updates. Default: {LOOK_SECONDS:.0f}; {LINE_SECONDS:.0f} without a terminal.",
)
def watch(run: str, interval: float | None) -> None:
    """Watch RUN until it ends; Ctrl-C closes the view, and the run continues. Writes no dataset.

    Shows its stages, each teacher's rate (over the last minute), the workers with their jobs, and what
    failed. Exit 0 when the run is done, 3 when it is done and more than 5% of a stage's rows failed, 4 when it is
    paused, 1 when it failed or was cancelled. Without a terminal, it prints a line whenever something changed within an
    interval.
    """
    console = Console()
    seconds = interval or (LOOK_SECONDS if console.is_terminal else LINE_SECONDS)
    with store() as database:
        with database.read() as session:
            run_id = find_run(session, run).id
        meter = Meter(console, line_seconds=seconds)
        view = View(database, run_id, meter, interval=seconds, warnings=lambda: _untaken(database, run_id))
        seen = _follow(view)
        if seen is not None and seen.state is RunState.DONE:
            click.echo(f"run {run} is done; 'persyn run status {run}' shows its results")
            _require_few_failed(database, run_id)
            return
        if seen is not None and seen.state is RunState.PAUSED:
            _say_paused(database, run_id)
    if seen is None and view.is_idle:
        click.echo(nobody_works(run), err=True)
        sys.exit(130)
    if seen is None:
        click.echo(f"the run continues without this window. Watch it again with: persyn run watch {run}", err=True)
        sys.exit(130)
    _not_done(run, seen.state, seen.error)


@run.command("set", short_help="Change how a run reaches its other models, also while it runs.")
@RUN
@click.argument("model", metavar="MODEL")
@VALUES
def set_transport(run: str, model: str, values: tuple[str, ...]) -> None:
    """Change how RUN reaches its student, quality, router or strategy, or how fast it runs; see 'teachers set'.

    MODEL is `student`, `quality`, `router` or `strategy`; of several scorers of quality, `quality.2` is the second. KEY
    is `gpus` or an option of the engine that changes no result; for a judge, an option of its model's engine.

    \b
    persyn run set small quality base_url=http://10.0.0.7:8000/v1
    persyn run set small student batch_tokens=8192
    """
    change(run, model, values)


@run.command(short_help="Stop a run; it can be resumed.")
@RUN
def cancel(run: str) -> None:
    """Stop RUN; finished results are kept, and 'resume' continues it."""
    with store() as database, database.write() as session:
        pipeline.cancel(session, find_run(session, run), actor=owner.actor())
    click.echo(f"run {run} is cancelled; 'persyn run resume {run}' continues it")


@run.command("list")
@JSON
def list_runs(as_json: bool) -> None:
    """List the runs and their states.

    A running run without workers is shown as waiting (for a server) or stopped.
    """
    with store() as database, database.read() as session:
        prompts = select(func.count()).where(RunPrompt.run_id == Run.id).scalar_subquery()
        found = session.execute(
            select(Run.id, Run.name, Run.state, Run.stage, prompts, Run.created_at, Run.error, Run.priority).order_by(
                Run.id
            )
        ).all()
        holders, waits = workload.holders(session), waiting_runs(session)
    rows = [
        (name, effective_state(state, holders.get(run_id, ()), is_waiting=run_id in waits), *rest)
        for run_id, name, state, *rest in found
    ]
    columns = ["name", "state", "stage", "prompts", "created", "error", "priority"]
    if not as_json and not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    show(columns, rows, as_json=as_json)
    if not rows and not as_json:
        url = database.url.render_as_string(hide_password=True)
        click.echo(f"no runs in the store {url}; set PERSYN_DATABASE_URL or PERSYN_HOME to use another", err=True)
    if not as_json and any(state == "stopped" for _, state, *_ in rows):
        click.echo("stopped: no worker holds a job of the run; 'persyn run resume RUN' continues it")


@run.command()
@RUN
@JSON
def status(run: str, as_json: bool) -> None:
    """Show the progress of RUN by stage, and its results."""
    with store() as database, database.read() as session:
        found = find_run(session, run)
        if as_json:
            waits = snapshot(session, found).waits
            said = msgspec.to_builtins(summary.facts(session, found)) | {"waits": msgspec.to_builtins(waits)}
            said["extensions"] = msgspec.to_builtins(extension.of_run(session, found))
            said["recalibrations"] = recalibration.listed(session, found)
            said["spending"] = msgspec.to_builtins(spending.facts(session, found))
            click.echo(msgspec.json.encode(said).decode())
        else:
            summary.show(session, found)


def work(database: Database, run_id: int) -> None:
    """Work a run to its end, here or by workers elsewhere; then write its dataset and print a summary."""
    settings = Settings.from_environment()
    if settings.broker_url is None:
        stopped = _work_here(database, settings, run_id)
    else:
        stopped = _watch(database, settings, settings.broker_url, run_id)
    with database.read() as session:
        found = session.get_one(Run, run_id)
        name, state, error = found.name, found.state, found.error
    if state is RunState.DONE:
        _finish(database, run_id, settings.home / "datasets" / name)
        _require_few_failed(database, run_id)
    elif stopped:
        click.echo(f"{stopped}: persyn run resume {name}", err=True)
        sys.exit(130)
    elif state is RunState.PAUSED:
        _say_paused(database, run_id)
    else:
        _not_done(name, state, error)


def _require_few_failed(database: Database, run_id: int) -> None:
    """Exit with `EXIT_MANY_FAILED` if a finished run has an unusual share of failed rows."""
    with database.read() as session:
        run = session.get_one(Run, run_id)
        large = [each for each in shortfalls(count_rows(session, run)) if each.is_large]
        name, needed = run.name, pipeline.needed(session, run)
    for shortfall in large:
        click.echo(f"warning: {plain(str(shortfall))}", err=True)
    if retriable := [each for each in large if each.stage in needed]:
        click.echo(
            f"run {name} is done, but many rows failed; correct the cause and retry them: "
            f"persyn jobs retry {name} --rows {retriable[0].reasons[0][0]}",
            err=True,
        )
    elif large:
        click.echo(f"run {name} is done, but many rows failed; {pipeline.FINAL}", err=True)
    if large:
        sys.exit(EXIT_MANY_FAILED)


def _not_done(name: str, state: RunState, error: str | None) -> NoReturn:
    if state is RunState.CANCELLED:
        raise PersynError(f"run {name} was cancelled; continue with: persyn run resume {name}")
    if state is RunState.DELETING:
        raise PersynError(f"run {name} is being deleted")
    raise PersynError(
        f"run {name} failed in {error}; correct the cause, then: persyn run resume {name}; "
        "or start a changed run file under another name"
    )


def _say_paused(database: Database, run_id: int) -> NoReturn:
    """Say why a run is paused, what the rest would cost and how to continue; exit with `EXIT_PAUSED`."""
    with database.read() as session:
        run = session.get_one(Run, run_id)
        click.echo("\n".join(summary.paused(run, spending.facts(session, run))), err=True)
    sys.exit(EXIT_PAUSED)


def require_celery() -> None:
    """With a broker, require Celery before creating a run that could not be worked without it."""
    if Settings.from_environment().broker_url is not None:
        import persyn.workers.cluster.app  # noqa: F401


def _work_here(database: Database, settings: Settings, run_id: int) -> str:
    """Work a run in this process; return a message if it was asked to stop, otherwise an empty text."""
    with Bars(database, run_id) as bars:
        crew = Crew.of_run(database, settings, run_id, bars)
        with _stopping_gently(crew.stopping, "stopping after saving finished results (press again to stop at once)"):
            crew.run()
    return "stopped; finished results are stored. Continue with" if crew.stopping.is_set() else ""


def _watch(database: Database, settings: Settings, broker_url: str, run_id: int) -> str:
    """Watch a run worked by workers until it ends or Ctrl-C; return a message in that case, otherwise an empty text.

    Also dispatches jobs meanwhile, in case no other dispatcher is running.
    """
    from persyn.workers.cluster import app
    from persyn.workers.cluster.dispatch import Dispatcher

    celery = app.make(broker_url)
    dispatcher = Dispatcher(database, celery, lease_seconds=settings.lease_seconds)
    ringing = threading.Thread(target=dispatcher.run, name="dispatcher")
    ringing.start()
    try:
        view = View(database, run_id, Meter(), interval=LOOK_SECONDS, warnings=lambda: _untaken(database, run_id))
        over = _follow(view)
    finally:
        dispatcher.stop.set()
        ringing.join()
    return "" if over else "the run continues without this window. Watch it again with"


def _follow(view: View) -> Snapshot | None:
    """Follow a run until it ends or Ctrl-C; return the last snapshot, or None."""
    closed = threading.Event()
    with _stopping_gently(closed, ""):
        return view.follow(closed)


def _untaken(database: Database, run_id: int) -> list[str]:
    """Describe queues of a run that no running worker serves, as far as the broker can be queried."""
    settings = Settings.from_environment()
    if settings.broker_url is None:
        return []
    from persyn.workers.cluster import app, roll_call

    with database.read() as session:
        waiting = workload.backlogs(session, run_id=run_id)
    if all(backlog.workers for backlog in waiting):
        return []
    try:
        present = roll_call.call_roll(app.make(settings.broker_url))
    except app.BROKER_ERRORS:
        return []  # reported by the dispatcher
    return [nobody_takes(backlog) for backlog in roll_call.untaken(waiting, present) if not backlog.workers]


def _finish(database: Database, run_id: int, folder: Path) -> None:
    with database.read() as session:
        run = session.get_one(Run, run_id)
        name, has_texts = run.name, not lookup.is_scores_only(session, run)
    # Repeat the last export's options: resuming a run must not undo a user's filters.
    with contextlib.suppress(FolderChanged):  # another process of this run wrote it
        if has_texts:
            export.write(database, run_id, folder, manifest.options_of(folder))
    with database.read() as session:
        summary.show(session, session.get_one(Run, run_id))
    place = folder if has_texts else "none: the responses were imported as scores only"
    click.echo(f"\ndataset   {place}\nstore     {database.url.render_as_string(hide_password=True)}")
    export_too = f" | persyn export {name}" if has_texts else ""
    click.echo(f"next      persyn report {name} | persyn compare {name}{export_too} | persyn run status {name}")


@contextmanager
def _stopping_gently(stop: threading.Event, what: str) -> Iterator[None]:
    """Set `stop` and print a message on the first Ctrl-C or SIGTERM; interrupt on the second."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if what:
            click.echo(f"\n{what}", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
