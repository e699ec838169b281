"""The Python interface: open a store, start and work runs, read them as Arrow tables, and route new prompts.

`persyn` exports the public names of this module. The commands use the same functions of the lower layers.
"""

from __future__ import annotations

import html
import os
import queue
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial, wraps
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import msgspec
import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.analysis import compare, custom_strategy, new_prompts, spending, summary, tables, verdict, watch
from persyn.analysis import plan as planning
from persyn.analysis.growth import RunGrowth
from persyn.analysis.growth import warn as _warn
from persyn.analysis.new_prompts import PromptInput
from persyn.analysis.plan import Plan
from persyn.analysis.spending import Spending as Spending
from persyn.analysis.summary import Summary
from persyn.analysis.text_table import text_table
from persyn.analysis.verdict import RunVerdict as RunVerdict
from persyn.analysis.watch import Snapshot as Snapshot
from persyn.config import On, Per, RunConfig, load_config
from persyn.dataset import export, manifest
from persyn.dataset.options import ExportOptions as ExportOptions
from persyn.db import catalog, lookup
from persyn.db.catalog import RunState
from persyn.db.connect import Database
from persyn.errors import PersynError, UsageError, shorten
from persyn.jobs import owner
from persyn.method.rewards import Matrix, Normalisation
from persyn.operations.of_run import RunOperations
from persyn.report.figure import Figure
from persyn.runs import budgets, pipeline, preflight, run_file, same_run, start
from persyn.settings import Settings
from persyn.stages.batch import Progress
from persyn.student.pilot_plan import PilotSettings as PilotSettings
from persyn.student.training_settings import TrainingSettings as TrainingSettings
from persyn.workers.runner.crew import Crew
from persyn.workers.runner.listener import Counter

if TYPE_CHECKING:
    import datasets

    from persyn.analysis.pilot import PilotFacts
    from persyn.report.drawing import Picture

__all__ = [
    "ExportOptions",
    "ExportedDataset",
    "Figure",
    "PilotSettings",
    "Plan",
    "Progress",
    "Run",
    "RunState",
    "Snapshot",
    "Spending",
    "Store",
    "Summary",
    "TrainingSettings",
    "open",
]

Config: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]
"""The tables of a run file as a dict, or the path of such a file."""

P = ParamSpec("P")
T = TypeVar("T")


def _without_causes(act: Callable[P, T]) -> Callable[P, T]:
    """Raise a function's `UsageError`s without causes: the message is enough, and a notebook prints each traceback."""

    @wraps(act)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return act(*args, **kwargs)
        except UsageError as error:
            raise error from None

    return call


@_without_causes
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

    @_without_causes
    def plan(self, config: Config) -> Plan:
        """Estimate the requests, tokens, cost and hours of a run; nothing is started or stored.

        A notebook shows the plan as tables. For an existing run, it covers the remaining work. Problems that would
        stop the run are warnings here and errors in `start`.
        """
        wanted = _config(config)
        identify = partial(preflight.identify, say=_warn)
        found = planning.of_config(self._database, wanted, identify=identify, say=_warn)
        if found.state is None:
            for text in preflight.warnings(preflight.check(wanted), with_errors=True):
                _warn(text)
        return found

    @_without_causes
    def start(self, config: Config) -> Run:
        """Create a run with its prompts and first jobs; `Run.work` or `persyn worker` processes work it.

        An existing run of the same configuration is returned unchanged, except for its budget: with a higher one, a run
        that has stopped for its budget can be worked again. Raises `UsageError` for a mistake in the
        configuration, a name that another configuration has taken, and whatever would stop the run on this host.
        """
        wanted = _config(config)
        with self._database.read() as session:
            is_new = start.find(session, wanted) is None
        known = preflight.identify(wanted, say=_warn) if is_new else {}
        if is_new:
            self._require_fit(wanted)
        with self._database.write() as session:
            run = self._run(pipeline.start_run(session, wanted, actor=owner.actor(), known=known, say=_warn))
        if is_new:
            spending.record(self._database, run._id, is_start=True)
        return run

    def _require_fit(self, config: RunConfig) -> None:
        # With a broker, workers on other hosts may have what this one lacks.
        is_here = self._settings.broker_url is None
        found = preflight.check(config)
        for text in preflight.warnings(found, with_errors=not is_here):
            _warn(text)
        if is_here:
            preflight.require(found)

    def _run(self, row: catalog.Run) -> Run:
        return Run(self._database, self._settings, row.id, row.name)


class Run(RunOperations, RunGrowth):
    """One run of a store. Tables are read on each call and show the run's current state.

    Tables are `pyarrow.Table`: `.to_pandas()` and `polars.from_arrow` take them. Their columns are explained in
    docs/python.md.
    """

    def __init__(self, database: Database, settings: Settings, run_id: int, name: str) -> None:
        self._database = database
        self._settings = settings
        self._id = run_id
        self.name = name

    def __repr__(self) -> str:
        return f"<persyn.Run {self.name}>"

    def _repr_html_(self) -> str:
        """Its state, and the counts of its stages."""
        with self._read() as (session, run):
            state, stages = run.state.value, pipeline.progress(session, run)
            idle = "; no worker holds a job of it" if watch.snapshot(session, run).is_idle else ""
        rows = [(name, counts.total, counts.done, counts.failed, counts.pending) for name, counts in stages.items()]
        table = text_table(("stage", "rows", "done", "failed", "pending"), rows)
        return f"<pre>{html.escape(f'run {self.name}: {state}{idle}')}\n\n{html.escape(table)}</pre>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and (self._id, self._database.url) == (other._id, other._database.url)

    def __hash__(self) -> int:
        return hash((self._id, self._database.url))

    # How it stands, and its life.

    @property
    def state(self) -> RunState:
        """The state as text: running, done, failed, cancelled or paused."""
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

    def spending(self) -> Spending:
        """What was planned, is spent and will have been spent, by stage and model; and how the budget stands."""
        with self._read() as (session, run):
            return spending.facts(session, run)

    def progress(self) -> dict[str, Progress]:
        """The rows of each stage that the run has reached: total, done, failed, pending."""
        with self._read() as (session, run):
            return pipeline.progress(session, run)

    def work(self, progress: Callable[[str, Progress], object] | None = None) -> Run:
        """Work the run in this process until it is done; return it.

        progress: called in this thread with a stage and its counts, whenever rows of it were written. An exception in
                  it, or an interrupt, stops the work; finished rows are stored, and another call of `work` continues.

        Raises `PersynError` when the run failed, was cancelled, or is paused; `resume` continues it, and `Store.start`
        with a raised budget one whose budget was used up. Warns of a run that is done although more than 5% of a
        stage's rows failed; a notebook shows the counts of the returned run.
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
        if state is RunState.PAUSED:
            how = "raise its budget and call start() of the store" if budgets.is_used_up(run) else "call resume()"
            raise PersynError(f"run {self.name} is paused: {error}; {how}, then work()")
        return self

    @_without_causes
    def resume(self) -> Run:
        """Requeue failed and cancelled jobs; returns the run, to call `work`.

        A run that is done and misses no row is unchanged.
        """
        with self._write() as (session, run):
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
        is_list = isinstance(reasons, Collection) and not isinstance(reasons, str)
        if not is_list or not reasons or not all(isinstance(reason, str) for reason in reasons):
            raise UsageError(f"reasons must be a list of texts, such as ['refused'], got {reasons!r}")
        with self._write() as (session, run):
            pipeline.retry_rows(session, run, reasons, actor=owner.actor())
        return self

    def watch(self, interval: float = 1.0) -> Iterator[Snapshot]:
        """Yield snapshots until the run ends, whichever process works it; the last one has the final state.

        interval: seconds between two snapshots.

        It works nothing itself, and warns when no process works the run.
        """
        idle_since: datetime | None = None
        is_warned = False
        while True:
            with self._read() as (session, run):
                seen = watch.snapshot(session, run)
            idle_since = (idle_since or seen.at) if seen.is_idle else None
            if idle_since is not None and seen.at - idle_since >= watch.IDLE and not is_warned:
                is_warned = True
                _warn(f"no worker holds a job of run {self.name}; call work() in another thread, or start a worker")
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
        """A row for each raw score of those responses; `measure` is quality, its parts, or learnability."""
        with self._read() as (session, run):
            return tables.scores(session, run)

    def rewards(
        self,
        alpha: float | None = None,
        *,
        normalise: Normalisation | None = None,
        per: Per | None = None,
        on: On | None = None,
        learnability: str | None = None,
    ) -> pa.Table:
        """A row for each cell of the grid; null where a score is missing.

        alpha:     weight of learnability, 0 to 1.
        normalise: minmax, zscore or rank.
        per:       what a log-likelihood is divided by: token, character or response.
        on:        the part of a response that it is computed on: answer, reasoning or both.
        learnability: its definition: log_likelihood, rank_surprisal_ratio, ...

        Default: the run's own.
        """
        _require_alpha(alpha)
        with self._read() as (session, run):
            return tables.rewards(session, run, compare.Reward(alpha, normalise, per, on, learnability))

    def assignments(self) -> pa.Table:
        """A row for each prompt that has a teacher."""
        with self._read() as (session, run):
            return tables.assignments(session, run)

    @_without_causes
    def comparison(
        self,
        alpha: float | None = None,
        *,
        normalise: Normalisation | None = None,
        per: Per | None = None,
        on: On | None = None,
        learnability: str | None = None,
        refit: bool = False,
    ) -> pa.Table:
        """A row for each strategy: its estimated reward on the hold-out with a 95% interval, tokens and cost.

        alpha, normalise, per, on, learnability: as in `rewards`.
        refit: also fit a head and evaluate nearest neighbours for this reward; needs the router's backbone.

        `table.schema.metadata[b"persyn"]` is JSON with these settings and what is unavailable. Raises `UsageError`
        for a run without scored hold-out prompts.
        """
        _require_alpha(alpha)
        reward = compare.Reward(alpha, normalise, per, on, learnability)
        scores: dict[str, Matrix | str] = {**self._refitted(reward)} if refit else {}
        scores |= custom_strategy.ask(self._database, self._id, self._settings, reward)
        with self._read() as (session, run):
            found = compare.compare(session, run, reward, scores=scores)
        if found.is_partial:
            _warn(compare.partial_warning(self.name))
        return tables.comparison(found)

    @_without_causes
    def dataset(self, options: ExportOptions | None = None) -> pa.Table:
        """The dataset: each prompt with its assigned teacher's response, in the columns of the Parquet export.

        options: kind and filters, as `persyn export` has them; with splits there is a column `split`.
        """
        chosen = _options(options)
        splits: list[str] = []

        def examples(session: Session) -> Generator[Any]:
            with closing(export.examples(session, self._id, chosen)) as rows:
                for split, example in rows:
                    splits.append(split)
                    yield example

        with self._database.read() as session, closing(examples(session)) as rows:
            table = chosen.of_kind.columns.table(rows)
        return table.append_column("split", pa.array(splits, pa.string())) if chosen.splits else table

    def to_dataset(self, options: ExportOptions | None = None) -> datasets.Dataset:
        """The dataset as a Hugging Face `Dataset`; needs the package `datasets`."""
        try:
            from datasets import Dataset
            from datasets.table import InMemoryTable
        except ImportError:
            raise UsageError("to_dataset needs the package datasets: pip install datasets") from None
        return Dataset(InMemoryTable(self.dataset(options)))

    @_without_causes
    def export(
        self, folder: str | os.PathLike[str] | None = None, options: ExportOptions | None = None
    ) -> ExportedDataset:
        """Write the dataset with its card and manifest, replacing an earlier one as a whole.

        folder: default: `datasets/NAME` in the store's home, `datasets-KIND/NAME` for another kind than sft.

        Warns of teachers whose responses are exported and whose licence is not stated, and of responses that a reader
        cannot tell from their reasoning.
        """
        chosen = _options(options)
        default = export.default_folder(self._settings.home, self.name, chosen.kind)
        place = (Path(folder) if folder is not None else default).absolute()
        written = export.write(self._database, self._id, place, chosen)
        if silent := [each.name for each in written.teachers if each.exported and not each.license]:
            _warn(f"no licence is stated for {', '.join(silent)}: check how their responses may be used")
        if written.ambiguous:
            _warn(
                f"{written.ambiguous:,} of {written.responses:,} responses contain <think> or </think> themselves: "
                "where reasoning is in the text, readers may take the wrong part for the answer"
            )
        return ExportedDataset(**{field.name: getattr(written, field.name) for field in fields(written)}, folder=place)

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

    def verdict(self, *, by: str | None = None) -> RunVerdict:
        """Whether routing pays: the router's expected gain over the best single teacher, and what follows from it.

        by: the field of the prompts' rows, or `source`, to group prompts by. Default: the first field in the run's
            `[router] features`, or the source where there are several.

        `says` has it in a sentence. Raises `UsageError` when there is no verdict, with the reason.
        """
        with self._read() as (session, run):
            return verdict.facts(session, run, by=by)

    @_without_causes
    def pilot(
        self, settings: PilotSettings | None = None, progress: Callable[[str, int, int, str], object] | None = None
    ) -> PilotFacts:
        """Train small students on the calibration responses, and judge which definition of the reward predicts them.

        settings: what is trained and asked, such as `persyn.PilotSettings(prompts=200, gpus=1)`; its `training` is a
                  `persyn.TrainingSettings`.
        progress: called with what is done, the total, how much of it is done, and a remark.

        `says` and `advice` have the result in a sentence each. What students became is kept in the store's home, so
        that a pilot that is called again trains only students that are missing. Raises `UsageError` for a run that is
        not scored, and for a student that cannot be trained.
        """
        from persyn.analysis import pilot as words
        from persyn.student import pilot, pilot_plan

        with self._read() as (session, run):
            plan = pilot_plan.read(session, run, _checked(settings or PilotSettings()))
        outcomes = pilot.run(self._database, plan, self._settings, progress or (lambda *_: None))
        return words.facts(plan, outcomes)

    def route(
        self, prompts: PromptInput | Sequence[PromptInput], *, labels: new_prompts.Labels | None = None
    ) -> pa.Table:
        """Score every teacher for new prompts, which are not stored, and choose one for each.

        prompts: texts, or conversations that end with a user's turn; one alone needs no list.
        labels:  for a router that reads fields of a prompt's row (`features`): {field: the label of each prompt, or
                 None}.

        The run's router, or its strategy if that is a function, is loaded in a separate process that ends after the
        call: give many prompts at once. Raises `UsageError` for a run that has neither.
        """
        conversations = new_prompts.conversations(prompts)
        with self._read() as (session, run):
            router = new_prompts.of_run(session, run)
        return router.route(conversations, self._settings, labels)

    def _work(self, progress: Callable[[str, Progress], object] | None) -> None:
        progress_queue = _ProgressQueue(self._database, self._id)
        crew = Crew.of_run(self._database, self._settings, self._id, progress_queue)
        # Workers have a thread of their own, so that an interrupt of this one asks them to stop, and waits for that.
        with ThreadPoolExecutor(1, "persyn-work") as pool:
            working = pool.submit(crew.run)
            working.add_done_callback(lambda _: progress_queue.updates.put(None))
            try:
                for stage, counts in iter(progress_queue.updates.get, None):
                    if progress is not None:
                        progress(stage, counts)
            except BaseException:
                crew.stopping.set()
                raise
        working.result()

    def _refitted(self, reward: compare.Reward) -> dict[str, Matrix]:
        from persyn.analysis import refits  # brings torch

        with self._read() as (session, run):
            cells = refits.read(session, run, reward)
        return refits.freeze(cells, self._settings.home).scores(reward.alpha, reward.how)

    def _drawable(self, group_by: str | None) -> tuple[dict[str, Callable[[], Picture]], dict[str, str]]:
        """Functions that draw each figure, and reasons why others are unavailable."""
        from persyn.report import figures, gather  # bring matplotlib

        with self._read() as (session, run):
            report = gather.gather(session, run, group_by=group_by)
        return figures.drawable(report), report.absent


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExportedDataset(manifest.Manifest):
    """The manifest of an exported dataset, and the folder where it was written."""

    #: Absolute.
    folder: Path

    def __repr__(self) -> str:
        left_out = {**self.failed, **{f"dropped by {name}": count for name, count in self.dropped.items()}}
        left_out["missing"] = self.missing
        parts = "".join(f", {name} {count:,}" for name, count in left_out.items() if count)
        kind = self.export.of_kind
        rows = f"{self.exported:,} of {self.assigned:,} rows"
        if kind.name != "sft":
            rows = f"{self.exported:,} rows ({kind.name}) of {self.used:,} of {self.assigned:,} {kind.unit}"
        return f"<persyn.ExportedDataset {self.run}: {rows} in {self.folder}{parts}>"


class _ProgressQueue(Counter):
    """Passes counts to the thread that waits for the work."""

    def __init__(self, database: Database, run_id: int) -> None:
        super().__init__(database, run_id)
        self.updates: queue.SimpleQueue[tuple[str, Progress] | None] = queue.SimpleQueue()

    def counted(self, stage: str, counts: Progress) -> None:
        """Pass new counts on."""
        self.updates.put((stage, counts))


def _config(given: Config) -> RunConfig:
    if isinstance(given, Mapping):
        return run_file.parse(given)
    if isinstance(given, str | os.PathLike):
        return run_file.read(Path(given))
    raise UsageError(f"config must be the path of a run file, or a dict of its tables, got {shorten(repr(given))}")


def _options(given: ExportOptions | None) -> ExportOptions:
    if given is None:
        return ExportOptions()
    if not isinstance(given, ExportOptions):
        raise UsageError(f"options must be a persyn.ExportOptions, such as ExportOptions(cap=1000), got {given!r}")
    return given


def _checked(settings: PilotSettings) -> PilotSettings:
    try:
        return msgspec.convert(msgspec.to_builtins(settings), PilotSettings)
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(f"settings must be a valid persyn.PilotSettings: {error}") from None


def _require_alpha(alpha: object) -> None:
    if alpha is not None and not isinstance(alpha, Real):
        raise UsageError(f"alpha must be a number within [0, 1], got {alpha!r}")


def _warn_of_failures(session: Session, run: catalog.Run) -> None:
    needed = pipeline.needed(session, run)
    for shortfall in watch.shortfalls(watch.count_rows(session, run)):
        if shortfall.is_large:
            retry = f"correct the cause, then call retry({[reason for reason, _ in shortfall.reasons]}) and work()"
            _warn(f"run {run.name}: {shortfall}; {retry if shortfall.stage in needed else pipeline.FINAL}")
