"""The Python interface: open a store, start and work runs, read them as Arrow tables, and route new prompts.

`persyn` exports the public names of this module. The commands use the same functions of the lower layers.
"""

from __future__ import annotations

import os
import queue
import sys
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.analysis import compare, custom_strategy, summary, tables, watch
from persyn.analysis import plan as planning
from persyn.analysis.plan import Plan
from persyn.analysis.summary import Facts as Summary
from persyn.analysis.watch import Snapshot as Snapshot
from persyn.config import Per, RunConfig, load_config
from persyn.dataset import export, formats
from persyn.dataset.manifest import Manifest
from persyn.dataset.options import ExportOptions as ExportOptions
from persyn.db import catalog, lookup
from persyn.db.catalog import RunState
from persyn.db.connect import Database
from persyn.errors import EngineError, PersynError, UsageError
from persyn.ingest import turns
from persyn.ingest.record import Flaw
from persyn.jobs import owner
from persyn.llm import host
from persyn.llm.host import HostDied
from persyn.llm.protocols import Failed, Message, Route, Routed
from persyn.method.rewards import Matrix, Normalisation
from persyn.method.strategies import STRATEGIES
from persyn.runs import pipeline, preflight, run_file, same_run, start
from persyn.settings import Settings
from persyn.stages import assign
from persyn.stages.batch import Progress as Counts
from persyn.workers.runner.crew import Crew
from persyn.workers.runner.listener import Counter

if TYPE_CHECKING:
    import datasets

    from persyn.report.drawing import Picture

__all__ = [
    "Counts",
    "ExportOptions",
    "Figure",
    "Manifest",
    "Plan",
    "Run",
    "RunState",
    "Snapshot",
    "Store",
    "Summary",
    "open",
]

Config: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]
"""The tables of a run file as a dict, or the path of such a file."""

PromptInput: TypeAlias = str | Sequence[Mapping[str, str]]
"""A text, or a conversation of {"role", "content"} turns that ends with the user's."""


def open(url: str | os.PathLike[str] | None = None, *, home: str | os.PathLike[str] | None = None) -> Store:
    """Open a store; a missing SQLite file is created.

    url:  a database URL (`sqlite:///persyn.db`, `postgresql+psycopg://user@host/name`), or the path of a SQLite file.
          Default: PERSYN_DATABASE_URL, else `persyn.db` in `home`.
    home: the folder of checkpoints, datasets and engine logs. Default: PERSYN_HOME, else `./persyn-data`.

    Raises `UsageError` when the database does not answer, or needs `persyn db upgrade`.
    """
    given = dict(os.environ)
    if home is not None:
        given["PERSYN_HOME"] = os.fspath(home)
    if url is not None:
        place = os.fspath(url)
        given["PERSYN_DATABASE_URL"] = place if "://" in place else f"sqlite:///{Path(place).absolute()}"
    settings = Settings.from_environment(given)
    database = Database(settings.database_url)
    try:
        database.require_head()
    except BaseException:
        database.close()
        raise
    return Store(database, settings)


class Store:
    """An open store, returned by `open`: its runs, and methods to start one. As a context manager it closes itself."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<persyn.Store {self.url}>"

    def close(self) -> None:
        """Close every connection."""
        self._database.close()

    @property
    def url(self) -> str:
        """The address of the database, without its password."""
        return self._database.url.render_as_string(hide_password=True)

    @property
    def home(self) -> Path:
        """The folder of checkpoints, datasets and engine logs."""
        return self._settings.home

    def runs(self) -> list[Run]:
        """All runs, the oldest first."""
        with self._database.read() as session:
            found = session.execute(select(catalog.Run.id, catalog.Run.name).order_by(catalog.Run.id)).all()
        return [Run(self._database, self._settings, run_id, name) for run_id, name in found]

    def run(self, name: str) -> Run:
        """The run of this name; `UsageError` names those that exist."""
        with self._database.read() as session:
            return self._run(lookup.run(session, name))

    def plan(self, config: Config) -> Plan:
        """Estimate the requests, tokens, cost and hours of a run; nothing is started or stored.

        For an existing run, the estimate covers the remaining work. Problems that would stop the run are warnings here
        and errors in `start`.
        """
        wanted = _config(config)
        identify = partial(preflight.identify, say=_warn)
        found = planning.of_config(self._database, wanted, identify=identify, say=_warn)
        if found.state is None:
            for text in preflight.warnings(preflight.look(wanted), with_errors=True):
                _warn(text)
        return found

    def start(self, config: Config) -> Run:
        """Create a run with its prompts and first jobs; `Run.work` or `persyn worker` processes work it.

        An existing run of the same configuration is returned unchanged. Raises `UsageError` for a mistake in the
        configuration, a name that another configuration has taken, and whatever would stop the run on this host.
        """
        wanted = _config(config)
        with self._database.read() as session:
            is_new = start.find(session, wanted) is None
        known = preflight.identify(wanted, say=_warn) if is_new else {}
        if is_new:
            self._require_fit(wanted)
        with self._database.write() as session:
            return self._run(pipeline.start_run(session, wanted, actor=owner.actor(), known=known, say=_warn))

    def _require_fit(self, config: RunConfig) -> None:
        # With a broker, workers on other hosts may have what this one lacks.
        is_here = self._settings.broker_url is None
        found = preflight.look(config)
        for text in preflight.warnings(found, with_errors=not is_here):
            _warn(text)
        if is_here:
            preflight.require(found)

    def _run(self, row: catalog.Run) -> Run:
        return Run(self._database, self._settings, row.id, row.name)


class Run:
    """One run of a store. Tables are read on each call and show the run's current state.

    Tables are `pyarrow.Table`: `.to_pandas()` and `polars.from_arrow` take them. Their columns are explained in
    docs/python.md.
    """

    def __init__(self, database: Database, settings: Settings, run_id: int, name: str) -> None:
        self._database = database
        self._settings = settings
        self._id = run_id
        #: Its name, unique in the store.
        self.name = name

    def __repr__(self) -> str:
        return f"<persyn.Run {self.name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and (self._id, self._database.url) == (other._id, other._database.url)

    def __hash__(self) -> int:
        return hash((self._id, self._database.url))

    # How it stands, and its life.

    @property
    def state(self) -> RunState:
        """The state as text: running, done, failed or cancelled."""
        with self._read() as (_, run):
            return run.state

    @property
    def config(self) -> dict[str, Any]:
        """Its stored configuration: the tables of the run file, with defaults."""
        with self._read() as (_, run):
            return load_config(run.config).frozen()

    def summary(self) -> Summary:
        """The figures of stages, teachers and router, as printed by `persyn run status --json`."""
        with self._read() as (session, run):
            return summary.facts(session, run)

    def progress(self) -> dict[str, Counts]:
        """The rows of each stage that the run has reached: total, done, failed, pending."""
        with self._read() as (session, run):
            return pipeline.progress(session, run)

    def work(self, progress: Callable[[str, Counts], object] | None = None) -> Run:
        """Work the run in this process until it is done; return it.

        progress: called in this thread with a stage and its counts, whenever rows of it were written. An exception in
                  it, or an interrupt, stops the work; finished rows are stored, and another call of `work` continues.

        Raises `PersynError` when the run failed or was cancelled; `resume` tries again what failed. Warns of a run
        that is done although more than 5% of a stage's rows failed; `retry` retries them.
        """
        if self.state is RunState.RUNNING:
            self._work(progress)
        with self._read() as (session, run):
            state, error = run.state, run.error
            if state is RunState.DONE:
                _warn_of_failures(session, run)
        if state is RunState.FAILED:
            raise PersynError(f"run {self.name} failed in {error}; correct the cause, then call resume() and work()")
        if state is RunState.CANCELLED:
            raise PersynError(f"run {self.name} was cancelled; call resume() and work() to continue")
        return self

    def resume(self) -> Run:
        """Requeue failed and cancelled jobs; returns the run, to call `work`.

        A run that is done and misses no row is unchanged.
        """
        with self._database.write() as session:
            run = session.get_one(catalog.Run, self._id)
            try:
                change = same_run.look(session, run)
            except UsageError as error:
                _warn(f"{error}; the run keeps its prompts")
            else:
                if change is not None:
                    _warn(str(change))
            pipeline.resume(session, run, actor=owner.actor())
        return self

    def retry(self, reasons: Collection[str]) -> Run:
        """Delete rows that failed for these reasons, so that they are computed again; returns the run, to call `work`.

        reasons: first words of failures, such as `refused` or `server_error`.

        Raises `UsageError` while the run is worked, and when no row that it still needs failed so.
        """
        with self._database.write() as session:
            run = session.get_one(catalog.Run, self._id)
            pipeline.retry_rows(session, run, reasons, actor=owner.actor())
        return self

    def cancel(self) -> None:
        """Stop the run; finished rows are kept, and `resume` continues it. Raises `UsageError` if it has ended."""
        with self._database.write() as session:
            pipeline.cancel(session, session.get_one(catalog.Run, self._id), actor=owner.actor())

    def watch(self, interval: float = 1.0) -> Iterator[Snapshot]:
        """Yield snapshots until the run ends, whichever process works it; the last one has the final state.

        interval: seconds between two snapshots.
        """
        while True:
            with self._read() as (session, run):
                seen = watch.snapshot(session, run)
            yield seen
            if seen.state is not RunState.RUNNING:
                return
            time.sleep(interval)

    # Its data.

    def prompts(self) -> pa.Table:
        """A row for each prompt; `meta` is JSON."""
        with self._read() as (session, run):
            return tables.prompts(session, run)

    def responses(self) -> pa.Table:
        """A row for each response that the run uses: all of its grid, and those to its assignments."""
        with self._read() as (session, run):
            return tables.responses(session, run)

    def scores(self) -> pa.Table:
        """A row for each raw score of those responses; `measure` is quality or learnability."""
        with self._read() as (session, run):
            return tables.scores(session, run)

    def rewards(
        self, alpha: float | None = None, *, normalise: Normalisation | None = None, per: Per | None = None
    ) -> pa.Table:
        """A row for each cell of the grid; null where a score is missing.

        alpha:     weight of learnability, 0 to 1.
        normalise: minmax, zscore or rank.
        per:       what a log-likelihood is divided by: token, character or response.

        Default: the run's own.
        """
        with self._read() as (session, run):
            return tables.rewards(session, run, alpha=alpha, how=normalise, per=per)

    def assignments(self) -> pa.Table:
        """A row for each prompt that has a teacher."""
        with self._read() as (session, run):
            return tables.assignments(session, run)

    def comparison(
        self,
        alpha: float | None = None,
        *,
        normalise: Normalisation | None = None,
        per: Per | None = None,
        refit: bool = False,
    ) -> pa.Table:
        """A row for each strategy: its estimated reward on the hold-out with a 95% interval, tokens and cost.

        alpha, normalise, per: as in `rewards`.
        refit: also fit a head and evaluate nearest neighbours for this reward; needs the router's backbone.

        `table.schema.metadata[b"persyn"]` is JSON with these settings and what is unavailable. Raises `UsageError`
        for a run without scored hold-out prompts.
        """
        scores: dict[str, Matrix | str] = {**self._refitted(alpha, normalise, per)} if refit else {}
        scores |= custom_strategy.ask(self._database, self._id, self._settings, alpha=alpha, how=normalise, per=per)
        with self._read() as (session, run):
            found = compare.compare(session, run, alpha=alpha, how=normalise, per=per, scores=scores)
        if found.is_partial:
            _warn(compare.partial_warning(self.name))
        return tables.comparison(found)

    def dataset(self, options: ExportOptions | None = None) -> pa.Table:
        """The dataset: each prompt with its assigned teacher's response, in the columns of the Parquet export.

        options: filters, as `persyn export` has them; with splits there is a column `split`.
        """
        options = options or ExportOptions()
        splits: list[str] = []

        def examples(session: Session) -> Generator[formats.Example]:
            with closing(export.examples(session, self._id, options)) as rows:
                for split, example in rows:
                    splits.append(split)
                    yield example

        with self._database.read() as session, closing(examples(session)) as rows:
            table = formats.arrow_table(rows)
        return table.append_column("split", pa.array(splits, pa.string())) if options.splits else table

    def to_dataset(self, options: ExportOptions | None = None) -> datasets.Dataset:
        """The dataset as a Hugging Face `Dataset`; needs the package `datasets`."""
        try:
            from datasets import Dataset
            from datasets.table import InMemoryTable
        except ImportError as error:
            raise UsageError("to_dataset needs the package datasets: pip install datasets") from error
        return Dataset(InMemoryTable(self.dataset(options)))

    def export(self, folder: str | os.PathLike[str] | None = None, options: ExportOptions | None = None) -> Manifest:
        """Write the dataset with its card and manifest, replacing an earlier one as a whole.

        folder: default: `datasets/NAME` in the store's home.
        """
        place = Path(folder) if folder is not None else self._settings.home / "datasets" / self.name
        return export.write(self._database, self._id, place, options)

    # Its figures.

    def figures(self, *, group_by: str | None = None) -> dict[str, Figure]:
        """The available figures of the run's report, by name.

        group_by: a metadata field to group prompts by. Default: the first with few values.
        """
        drawable, _ = self._drawable(group_by)
        return {name: Figure(draw()) for name, draw in drawable.items()}

    def figure(self, name: str, *, group_by: str | None = None) -> Figure:
        """One figure; raises `UsageError` listing the available ones for an unknown name."""
        found, absences = self._drawable(group_by)
        if name not in found:
            absent = "; ".join(f"{what}: {why}" for what, why in absences.items())
            raise UsageError(
                f"run {self.name} has no figure {name!r}; available: {', '.join(found) or 'none'}"
                + (f" (unavailable: {absent})" if absent else "")
            )
        return Figure(found[name]())

    # Its router.

    def route(self, prompts: Sequence[PromptInput]) -> pa.Table:
        """Score every teacher for new prompts, which are not stored, and choose one for each.

        prompts: texts, or conversations that end with a user's turn.

        The run's router, or its strategy if that is a function, is loaded in a separate process that ends after the
        call: give many prompts at once. Raises `UsageError` for a run that has neither.
        """
        conversations = [_conversation(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        with self._read() as (session, run):
            _require_router(run)
            spec = assign.route_spec(session, run)
            names = [teacher.name for teacher in lookup.teachers(session, run.id)]
        limits = {"load_seconds": self._settings.load_seconds, "stall_seconds": self._settings.stall_seconds}
        requests = [Route(number, messages) for number, messages in enumerate(conversations)]
        try:
            results = host.ask(spec, requests, self._settings.home, **limits) if requests else []
        except HostDied as death:
            raise EngineError(f"the router process of run {self.name} ended: {death}") from death
        rows = []
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Failed):
                raise EngineError(f"no scores for {request.messages[-1]['content']!r:.80}: {result.reason}")
            assert isinstance(result, Routed)
            rows.append(result.scores)
        return _routed([messages[-1]["content"] for messages in conversations], names, rows)

    @contextmanager
    def _read(self) -> Iterator[tuple[Session, catalog.Run]]:
        with self._database.read() as session:
            run = session.get(catalog.Run, self._id)
            if run is None:
                raise UsageError(f"run {self.name} is no longer in the store")
            yield session, run

    def _work(self, progress: Callable[[str, Counts], object] | None) -> None:
        told = _Told(self._database, self._id)
        crew = Crew.of_run(self._database, self._settings, self._id, told)
        # Workers have a thread of their own, so that an interrupt of this one asks them to stop, and waits for that.
        with ThreadPoolExecutor(1, "persyn-work") as pool:
            working = pool.submit(crew.run)
            working.add_done_callback(lambda _: told.updates.put(None))
            try:
                for stage, counts in iter(told.updates.get, None):
                    if progress is not None:
                        progress(stage, counts)
            except BaseException:
                crew.stopping.set()
                raise
        working.result()

    def _refitted(self, alpha: float | None, how: Normalisation | None, per: Per | None) -> dict[str, Matrix]:
        from persyn.analysis import refits  # brings torch

        with self._read() as (session, run):
            cells = refits.read(session, run, per=per)
        return refits.freeze(cells, self._settings.home).scores(alpha, how)

    def _drawable(self, group_by: str | None) -> tuple[dict[str, Callable[[], Picture]], dict[str, str]]:
        """Functions that draw each figure, and reasons why others are unavailable."""
        from persyn.report import figures, gather  # bring matplotlib

        with self._read() as (session, run):
            report = gather.gather(session, run, group_by=group_by)
        return figures.drawable(report), report.absent


class Figure:
    """A figure of a run; notebooks display it."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        #: The name of the figure, what it shows, and its content in words.
        self.name, self.title, self.description = picture.name, picture.title, picture.says

    def __repr__(self) -> str:
        return f"<persyn.Figure {self.name}: {self.description}>"

    def _repr_svg_(self) -> str:
        return self.svg()

    def svg(self) -> str:
        """SVG with real text and colours that follow the reader's light or dark scheme."""
        from persyn.report import drawing

        return drawing.svg(self._picture, ink="scheme")

    def png(self) -> bytes:
        """As PNG on white, 200 dots per inch."""
        from persyn.report import drawing

        return drawing.png(self._picture)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figure to a .svg or .png file."""
        place = Path(path)
        match place.suffix.lower():
            case ".svg":
                place.write_text(self.svg(), encoding="utf-8")
            case ".png":
                place.write_bytes(self.png())
            case ending:
                raise UsageError(f"a figure's file name must end in .svg or .png, got {ending or 'no extension'}")


class _Told(Counter):
    """Passes counts to the thread that waits for the work."""

    def __init__(self, database: Database, run_id: int) -> None:
        super().__init__(database, run_id)
        self.updates: queue.SimpleQueue[tuple[str, Counts] | None] = queue.SimpleQueue()

    def counted(self, stage: str, counts: Counts) -> None:
        """Pass new counts on."""
        self.updates.put((stage, counts))


def _config(given: Config) -> RunConfig:
    return run_file.parse(given) if isinstance(given, Mapping) else run_file.read(Path(given))


def _conversation(prompt: PromptInput) -> list[Message]:
    """The turns of a prompt; raises `UsageError` unless the last one is the user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    try:
        found = turns.read([dict(turn) for turn in prompt], "prompt")
        turns.require_order(found, "prompt")
    except (Flaw, TypeError, ValueError) as error:
        raise UsageError(f"a prompt must be a text or a list of turns: {error}") from error
    if not found or found[-1]["role"] != "user":
        raise UsageError("a conversation to route must end with the user's turn")
    return found


def _require_router(run: catalog.Run) -> None:
    kind = load_config(run.config).strategy.kind
    decided_by = STRATEGIES.require(kind, "strategy").decided_by
    if decided_by not in ("router", "function"):
        raise UsageError(f"run {run.name} uses strategy {kind}, which does not read prompts and has no router")
    if decided_by == "router" and run.router_id is None:
        raise UsageError(f"run {run.name} has no router yet: it is in stage {run.stage}")


def _warn_of_failures(session: Session, run: catalog.Run) -> None:
    for shortfall in watch.shortfalls(watch.count_rows(session, run)):
        if shortfall.is_large:
            reasons = [reason for reason, _ in shortfall.reasons]
            _warn(f"run {run.name}: {shortfall}; correct the cause, then call retry({reasons}) and work()")


def _routed(prompts: Sequence[str], teachers: Sequence[str], rows: Sequence[Sequence[float]]) -> pa.Table:
    """A row for each prompt, with the teacher of the highest score and its lead over the next one."""
    scores = np.array(rows, dtype=np.float64).reshape(len(prompts), len(teachers))
    highest = -np.sort(-scores, axis=1)
    columns = [pa.array(scores[:, column]) for column in range(len(teachers))]
    return pa.table(
        {
            "prompt": pa.array(prompts, pa.string()),
            "teacher": pa.array(teachers, pa.string()).take(pa.array(scores.argmax(axis=1))),
            "margin": highest[:, 0] - highest[:, 1],
            "scores": pa.StructArray.from_arrays(columns, names=list(teachers)),
        }
    )


def _warn(text: str) -> None:
    """Warn with the location of the caller's line that called this package."""
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "persyn":
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, stacklevel=depth)
