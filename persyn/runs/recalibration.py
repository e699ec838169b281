"""Have every teacher answer more prompts of a run, and fit its router again; what has no response yet is reassigned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import numpy as np
from sqlalchemy import ColumnElement, and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from persyn.config import IMPORTED, load_config
from persyn.db import lookup
from persyn.db.catalog import Role, Run, RunPrompt, RunState
from persyn.db.connect import take_time
from persyn.db.results import Assignment, Response
from persyn.db.work import Batch, Job, JobState
from persyn.errors import UsageError
from persyn.ingest import prompt_import
from persyn.jobs import queue
from persyn.llm import quality
from persyn.method import draws
from persyn.method.strategies import STRATEGIES
from persyn.runs import pipeline, scheduling
from persyn.stages import verdict
from persyn.stages.recalibrations import Recalibration
from persyn.stages.registry import ASSIGN, STAGES, reached

Choose: TypeAlias = Literal["active", "random"]
"""How prompts are chosen: where the router has learned least, those of extensions first, or at random."""

_WAYS = " or ".join(get_args(Choose))
#: Prompts changed by one statement.
_CHUNK = 500
_FIRST = next(iter(STAGES))


def ask(session: Session, run_id: int, n: int, how: Choose, *, actor: str) -> Recalibration:
    """Make n targets of a run calibration prompts, and reopen those that no teacher answers; `go_on` then continues it.

    Fewer, if there are no more. Raises `UsageError` for a run that cannot be recalibrated now, and where no prompt is
    left; the caller must then roll the transaction back.
    """
    if n < 1 or how not in get_args(Choose):
        raise UsageError(f"a recalibration needs 1 prompt or more, chosen by {_WAYS}, got {n} by {how!r}")
    queue.queues(session, run_id)  # locks the jobs: before the run, as when a worker saves results
    run = lookup.whole(session, run_id)
    _require_recalibratable(run)
    _stop_assigning(session, run, actor=actor)
    drawn = _draw(session, run, n, how)
    if not drawn:
        raise UsageError(f"run {run.name!r} has no prompt left that could be a calibration prompt")
    last = select(func.max(RunPrompt.recalibration)).where(RunPrompt.run_id == run.id)
    number = (session.scalar(last) or 0) + 1
    _take(session, run, [prompt_id for prompt_id, _ in drawn], number)
    router_id, run.router_id = run.router_id, None
    assert router_id is not None
    reopened = _reopen(session, run)
    take_time(session)
    return Recalibration(number, len(drawn), sum(extension > 0 for _, extension in drawn), reopened, router_id)


def go_on(session: Session, run_id: int, made: Recalibration, *, actor: str) -> None:
    """Continue a run whose teachers a recalibration asks, and record it."""
    run = lookup.whole(session, run_id)
    pipeline.go_back_to(session, run, _FIRST, actor=actor, detail={verdict.RECALIBRATED: msgspec.to_builtins(made)})


def _require_recalibratable(run: Run) -> None:
    """Raise `UsageError` for a run whose router cannot be fitted again."""
    config, why = load_config(run.config), ""
    if run.state not in (RunState.DONE, RunState.RUNNING):
        how = scheduling.how_to_continue(run) if run.state is RunState.PAUSED else f"persyn run resume {run.name}"
        why = f"it is {run.state}, and only a run that is done or running is recalibrated; first: {how}"
    elif STRATEGIES.require(config.strategy.kind, "strategy").decided_by != "router":
        why = f"its strategy is {config.strategy.name}, which uses no router"
    elif config.router.fitted is not None:
        why = "its router was imported; recalibrate the run that it was exported from, and export it again"
    elif all(teacher.engine == IMPORTED for teacher in config.teachers):
        why = "all of its teachers were imported, so that none can be asked"
    elif config.strategy.is_limited:
        why = (
            "its prompts are assigned together, within the costs and limits of [strategy]; start a run under another "
            "name with more calibration prompts, which generates no stored response again"
        )
    elif run.router_id is None:
        why = (
            "it has no router at the moment, since it is calibrated; wait until it assigns its prompts: "
            f"persyn run watch {run.name}"
        )
    if why:
        raise UsageError(f"run {run.name!r} cannot be recalibrated: {why}")


def _stop_assigning(session: Session, run: Run, *, actor: str) -> None:
    """Cancel the waiting jobs that assign prompts by the old router; raise `UsageError` while one is worked."""
    jobs = select(Job.id, Job.state).where(Job.run_id == run.id, Job.stage.in_(reached(ASSIGN)))
    found = session.execute(jobs.where(Job.state.in_((JobState.QUEUED, JobState.RUNNING)))).all()
    if any(job.state is JobState.RUNNING for job in found):
        raise UsageError(
            f"run {run.name!r} is assigning prompts at the moment; recalibrate it when it generates: persyn run watch "
            f"{run.name}"
        )
    if found:
        queue.cancel(session, run.id, actor=actor, job_ids=[job.id for job in found])


def _draw(session: Session, run: Run, n: int, how: Choose) -> list[tuple[int, int]]:
    """Ids of n targets that can be scored, each with its extension: the next ones of the draw at the run's start."""
    need = quality.need(load_config(run.config))
    found = prompt_import.drawable(session, run.id, seed=run.seed, need=need, most=n)
    lots = sorted((lot, prompt_id, extension) for extension, (_, part) in found.items() for lot, prompt_id in part)
    pairs = [(prompt_id, extension) for _, prompt_id, extension in lots]
    if how == "random":
        return pairs[:n]
    counted = select(RunPrompt.extension, func.count()).where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET)
    asked: dict[int, int] = dict(session.execute(counted.group_by(RunPrompt.extension)).all())
    places = {extension: place for place, extension in enumerate(found)}
    drawn = draws.even(
        np.array([places[extension] for _, extension in pairs], dtype=np.intp),
        np.array([asked.get(extension, 0) for extension in found], dtype=np.intp),
        np.array([left for left, _ in found.values()], dtype=np.intp),
        n,
    )
    return [pairs[place] for place in drawn]


def _take(session: Session, run: Run, prompt_ids: Sequence[int], number: int) -> None:
    """Make targets calibration prompts."""
    for start in range(0, len(prompt_ids), _CHUNK):
        part = RunPrompt.prompt_id.in_(prompt_ids[start : start + _CHUNK])
        changed = update(RunPrompt).where(RunPrompt.run_id == run.id, part)
        changed = changed.values(role=Role.CALIBRATION, recalibration=number)
        session.execute(changed.execution_options(synchronize_session=False))


def _reopen(session: Session, run: Run) -> int:
    """Take prompts from teachers that have not answered them, and do not at the moment; return how many.

    A prompt that [fallback] gave its teacher stays, as the choices before it are recorded.
    """
    former, answer = aliased(Assignment), aliased(Response)
    same = former.run_id == RunPrompt.run_id, former.prompt_id == RunPrompt.prompt_id, former.choice == 1
    answered = exists().where(answer.prompt_id == former.prompt_id, answer.teacher_id == former.teacher_id)
    is_open = and_(*same, ~answered, ~_is_in_flight(former))
    its_teacher = select(former.teacher_id).where(is_open).correlate(RunPrompt).scalar_subquery()
    of_run, reopened = RunPrompt.run_id == run.id, RunPrompt.former_teacher_id.is_not(None)
    session.execute(
        update(RunPrompt)
        .where(of_run, or_(reopened, its_teacher.is_not(None)))
        .values(former_teacher_id=its_teacher)
        .execution_options(synchronize_session=False)
    )
    open_ids = select(RunPrompt.prompt_id).where(of_run, reopened)
    session.execute(
        delete(Assignment)
        .where(Assignment.run_id == run.id, Assignment.prompt_id.in_(open_ids))
        .execution_options(synchronize_session=False)
    )
    counted = select(func.count()).select_from(RunPrompt).where(of_run, reopened)
    return session.scalars(counted).one()


def _is_in_flight(of: Any) -> ColumnElement[bool]:
    """Whether a job that is worked, or whose batch a provider has, asks the assignment's teacher."""
    has_batch = exists().where(Batch.job_id == Job.id, Batch.collected_at.is_(None))
    return exists().where(
        Job.run_id == of.run_id,
        Job.teacher_id == of.teacher_id,
        or_(Job.state == JobState.RUNNING, has_batch),
        of.prompt_id.between(Job.first_prompt_id, Job.last_prompt_id),
    )
