"""Change how a run's models are reached and how fast they run, also while the run is worked; see ADR 45."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import QualityTable, RunConfig, load_config
from persyn.db import lookup, notes, outages
from persyn.db.catalog import Run
from persyn.db.work import Job, JobState
from persyn.errors import UsageError
from persyn.ingest import versions
from persyn.jobs import queue
from persyn.jobs.queue import ModelJobs
from persyn.llm import engines, transport
from persyn.llm.engines import ENGINES, EngineKind
from persyn.llm.protocols import ModelSpec
from persyn.runs import prices, run_file, same_run
from persyn.runs.same_run import Difference
from persyn.stages.batch import queue_name
from persyn.stages.registry import STAGES

#: The keys of a run file's tables that contain transport.
_KEYS = ("options", "gpus")


def change(session: Session, run: Run, config: RunConfig, *, actor: str) -> list[Difference]:
    """Adopt the transport of a configuration that is otherwise the run's; return the differences.

    Waiting jobs go to the queue of the model as it is reached now, and a wait for its server ends. A worker lets the
    requests in flight finish and releases its jobs. No row is computed again.
    """
    if not _differences(run, config):
        return []
    _lock(session, run)
    found, jobs = _differences(run, config), queue.queues(session, run.id)
    before = {of: STAGES[of.stage].spec(session, run, of) for of, _ in jobs}
    taken = _with_tables(load_config(run.config), config)
    run.config, run.config_hash = taken.frozen(), taken.digest()
    teachers = lookup.teachers(session, run.id)
    for row, table in zip(teachers, taken.teachers, strict=True):
        row.price_in, row.price_out = versions.prices(table).values()
    session.flush()
    prices.note(session, run, taken, [teacher.id for teacher in teachers])
    for of, old in jobs:
        if (spec := STAGES[of.stage].spec(session, run, of)) != before[of]:
            _turn(session, run, of, old, spec)
    detail = {"changed": [each._asdict() for each in found]}
    notes.note(session, run, detail, actor=actor)
    return found


def change_one(session: Session, run: Run, model: str, given: Mapping[str, Any], *, actor: str) -> list[Difference]:
    """Set `gpus`, or options, of one model of a run; None restores the default of an option.

    model: `teacher NAME`, `student`, `quality`, `router` or `strategy`; `quality.2` is the second of several scorers.
           The options of a judge are those of its model's engine.
    Raises `UsageError` for unknown options, invalid values, and options that determine results.
    """
    _lock(session, run)
    was = load_config(run.config)
    place = _place(run, was, model)
    engine, table = same_run.models(was)[place]
    is_nested = bool(engine) and ENGINES.require(engine, "engine").is_nested
    kind = ENGINES[table.options["engine"] if is_nested else engine] if engine else None
    _require_known(model, kind, given)
    options = dict(table.options.get("options", {}) if is_nested else table.options)
    options |= {key: value for key, value in given.items() if key != "gpus"}
    options = {key: value for key, value in options.items() if value is not None}
    frozen = was.frozen()
    part = same_run.table(frozen, place)
    part["options"] = {**table.options, "options": options} if is_nested else options
    part["gpus"] = given.get("gpus", table.gpus)
    config = run_file.parse(frozen)
    before, after = (_decisive(each, place, is_nested=is_nested) for each in (was, config))
    if before != after:
        raise UsageError(
            f"{_why(kind, given, before, after)}, so it cannot be changed in run {run.name!r}; start a run under "
            f"another name. What can be changed: {', '.join(_may(kind))}"
        )
    return change(session, run, config, actor=actor)


def _lock(session: Session, run: Run) -> None:
    """Lock a run and its jobs and read it again, so that no other change is undone and no job is planned meanwhile.

    Jobs come before the run, as when a worker saves results; otherwise the two could deadlock.
    """
    queue.queues(session, run.id)
    session.refresh(run, with_for_update={"key_share": True})


def _differences(run: Run, config: RunConfig) -> list[Difference]:
    return same_run.differences(_transport(load_config(run.config)), _transport(config))


def _place(run: Run, config: RunConfig, model: str) -> str:
    """The key of a model's table in the run file."""
    kind, _, name = model.partition(" ")
    if kind != "teacher":
        places = {place: place for place in same_run.models(config) if "[" not in place}
        if not isinstance(config.quality, QualityTable):
            places |= {f"quality.{n}": place for n, place in enumerate(same_run.scorer_places(config), start=1)}
        if model not in places:
            raise UsageError(f"run {run.name!r} has no {model}; it has {', '.join(sorted(places))}, and its teachers")
        return places[model]
    names = [teacher.name for teacher in config.teachers]
    if name not in names:
        raise UsageError(f"run {run.name!r} has no teacher {name!r}; its teachers: {', '.join(names)}")
    return f"teachers[{names.index(name)}]"


def _may(kind: EngineKind | None) -> list[str]:
    return ["gpus", *sorted(kind.transport if kind else ())]


def _require_known(model: str, kind: EngineKind | None, given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for keys that are no options of a model's engine."""
    options = kind.options.__struct_fields__ if kind and kind.options else ()
    if unknown := [key for key in given if key not in ("gpus", *options)]:
        raise UsageError(
            f"the {model} has no option {', '.join(unknown)}; what can be changed: {', '.join(_may(kind))}. Anything "
            "else makes it another model: start a run under another name"
        )
    if given.get("gpus", 0) is None:
        raise UsageError("gpus= has no value; give a number, 0 for the CPU")


def _why(kind: EngineKind | None, given: Mapping[str, Any], was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if others := [key for key in given if key not in _may(kind)]:
        return f"{', '.join(others)} determines results"
    return (
        f"gpus = {given['gpus']} changes the default dtype from {was.get('dtype', 'the stored one')} to "
        f"{now.get('dtype', 'the stored one')}, which determines results"
    )


def _decisive(config: RunConfig, place: str, *, is_nested: bool) -> dict[str, Any]:
    engine, table = same_run.models(config)[place]
    found: dict[str, Any] = transport.decisive(engine, table.options, table.gpus) if engine else table.options
    return found.get("options", {}) if is_nested else found


def _transport(config: RunConfig) -> dict[str, Any]:
    return {
        place: {"gpus": table.gpus, "options": transport.of(engine, table.options) if engine else {}}
        for place, (engine, table) in same_run.models(config).items()
    }


def _with_tables(config: RunConfig, other: RunConfig) -> RunConfig:
    """A configuration with the options and GPUs of another one."""

    def taken(table: Any, of: Any) -> Any:
        return replace(table, **{key: getattr(of, key) for key in _KEYS})

    return replace(
        config,
        student=config.student and taken(config.student, other.student),
        quality=_qualities(taken, config, other),
        router=taken(config.router, other.router),
        strategy=taken(config.strategy, other.strategy),
        teachers=[taken(*pair) for pair in zip(config.teachers, other.teachers, strict=True)],
    )


def _qualities(taken: Callable[[Any, Any], Any], config: RunConfig, other: RunConfig) -> Any:
    """Those of the quality's one table, or of each of several."""
    found = [taken(*pair) for pair in zip(config.scorers, other.scorers, strict=True)]
    return found[0] if isinstance(config.quality, QualityTable) else found


def _turn(session: Session, run: Run, of: ModelJobs, old: str, spec: ModelSpec) -> None:
    queue.turn(session, run.id, of, queue=queue_name(spec), gpus=engines.gpus(spec))
    left = select(Job.id).where(Job.run_id == run.id, Job.queue == old, Job.state != JobState.DONE)
    if session.scalars(left.limit(1)).first() is None:
        outages.over(session, run.id, old)
