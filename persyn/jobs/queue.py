"""Leases on the jobs table: claim, extend, complete, fail, release, sweep.

A job is held by its fence. Each claim increments it and every later write checks it, so a worker
that lost its lease, by a long pause or a lost connection, can no longer write anything.
Every transition records an event in the same transaction. All times are the database's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Update,
    and_,
    case,
    false,
    func,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.catalog import Run, RunState
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState
from persyn.jobs import expenses

#: How long a claim lasts without a heartbeat, and how many heartbeats a worker sends in that time.
LEASE = timedelta(seconds=90)
BEATS = 6
#: Delay before a failed job is retried, doubled with each attempt.
BACKOFF = timedelta(seconds=2)

#: The runs of which no job is claimed, although jobs wait.
STOPPED = select(Run.id).where(Run.state.in_((RunState.PAUSED, RunState.DELETING)))
#: Of a job that is requeued with all its attempts.
_AGAIN: Mapping[str, Any] = {
    "attempts": 0,
    "not_before": None,
    "finished_at": None,
    "cancel_requested": False,
    "error": None,
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A job as its holder sees it."""

    id: int
    run_id: int
    stage: str
    queue: str
    teacher_id: int | None
    scorer_id: int | None
    first_prompt_id: int
    last_prompt_id: int
    attempts: int
    fence: int
    follows_job_id: int | None = None


@dataclass(frozen=True, slots=True)
class Swept:
    """A job that a sweep took back, and its new state."""

    id: int
    run_id: int
    state: JobState


_CLAIM_COLUMNS = (
    Job.id,
    Job.run_id,
    Job.stage,
    Job.queue,
    Job.teacher_id,
    Job.scorer_id,
    Job.first_prompt_id,
    Job.last_prompt_id,
    Job.attempts,
    Job.fence,
    Job.follows_job_id,
)


def claim(
    session: Session, *, owner: str, queue: str | None = None, run_id: int | None = None, lease: timedelta = LEASE
) -> Claim | None:
    """Claim the next waiting job, optionally of one queue or one run; None when there is none.

    A single statement: two workers never get the same job, and neither waits for the other.
    """
    wanted = [Job.state == JobState.QUEUED, is_claimable()]
    if queue is not None:
        wanted.append(Job.queue == queue)
    if run_id is not None:
        wanted.append(Job.run_id == run_id)
    following = (
        select(Job.id)
        .where(*wanted)
        .order_by(Job.priority, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    row = session.execute(
        update(Job)
        .where(Job.id == following)
        .values(
            state=JobState.RUNNING,
            owner=owner,
            fence=Job.fence + 1,
            attempts=Job.attempts + 1,
            lease_until=now(lease),
            heartbeat_at=now(),
            started_at=func.coalesce(Job.started_at, now()),
        )
        .returning(*_CLAIM_COLUMNS)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        return None
    job = Claim(**row._mapping)
    bulk.insert_new(session, Event, [_event(job, JobState.RUNNING, owner, {}, was=JobState.QUEUED)])
    return job


def extend(session: Session, held: Mapping[int, int], *, lease: timedelta = LEASE) -> set[int]:
    """Renew the leases of held jobs, given as {job id: fence}; return the ids of jobs no longer held.

    A job with a requested cancellation counts as lost: its holder must stop.
    """
    kept: set[int] = set()
    for job_id, fence in held.items():
        renewed = session.execute(
            _held(job_id, fence)
            .where(Job.cancel_requested == false())
            .values(heartbeat_at=now(), lease_until=now(lease))
        )
        if _rows(renewed):
            kept.add(job_id)
    return set(held) - kept


def hold(session: Session, job: Claim, *, lease: timedelta = LEASE, is_progress: bool = True) -> bool:
    """Check the fence in the transaction that writes results; if False, write nothing.

    is_progress: reset the job's attempts. Only attempts that save nothing count, so a job that makes
                 progress is never given up, however often its worker dies.
    """
    values: dict[str, Any] = {"heartbeat_at": now(), "lease_until": now(lease)}
    if is_progress:
        values["attempts"] = 0
    renewed = session.execute(_held(job.id, job.fence).where(Job.cancel_requested == false()).values(**values))
    return bool(_rows(renewed))


def complete(session: Session, job: Claim, *, owner: str) -> bool:
    """Complete a job whose results are all written; False if the lease was lost."""
    return _end(session, job, JobState.DONE, owner, {"finished_at": now(), "error": None})


def fail(session: Session, job: Claim, error: str, *, owner: str, is_final: bool = False) -> JobState | None:
    """Record a failed attempt: the job is retried after a delay, or fails for good.

    is_final: a retry would fail again.
    Returns the new state, or None if the lease was lost.
    """
    tried = session.execute(select(Job.attempts, Job.max_attempts).where(Job.id == job.id)).one()
    if is_final or tried.attempts >= tried.max_attempts:
        ended = _end(session, job, JobState.FAILED, owner, {"finished_at": now(), "error": error})
        return JobState.FAILED if ended else None
    wait = BACKOFF * 2**tried.attempts
    given_back = _end(session, job, JobState.QUEUED, owner, {"not_before": now(wait), "error": error})
    return JobState.QUEUED if given_back else None


def fail_waiting(session: Session, job: Claim, error: str, *, owner: str) -> None:
    """Fail the waiting jobs of a failed job's run and queue for the same reason: their model is unavailable."""
    _end_waiting(session, (Job.run_id == job.run_id, Job.queue == job.queue), JobState.FAILED, error, owner)


def halt(session: Session, job: Claim, why: str, *, owner: str) -> bool:
    """Cancel a held job and the waiting ones of the same model in its stage, until the run is resumed.

    Returns False if the lease was lost.
    """
    if not _end(session, job, JobState.CANCELLED, owner, {"finished_at": now(), "error": why}):
        return False
    halt_waiting(session, job.run_id, ModelJobs(job.stage, job.teacher_id, job.scorer_id), why, owner=owner)
    return True


def halt_waiting(session: Session, run_id: int, of: ModelJobs, why: str, *, owner: str) -> None:
    """Cancel the waiting jobs of a model in a stage, until the run is resumed."""
    _end_waiting(session, _of_model(run_id, of), JobState.CANCELLED, why, owner)


def _end_waiting(
    session: Session, which: tuple[ColumnElement[bool], ...], state: JobState, why: str, owner: str
) -> None:
    ended = session.execute(
        update(Job)
        .where(*which, Job.state == JobState.QUEUED)
        .values(state=state, finished_at=now(), error=why)
        .returning(Job.id, Job.run_id, Job.fence)
        .execution_options(synchronize_session=False)
    ).all()
    events = [_event(row, state, owner, {"error": why}, was=JobState.QUEUED) for row in ended]
    bulk.insert_new(session, Event, events)


def go_on(session: Session, run_id: int, stage: str, *, actor: str) -> int:
    """Requeue the jobs of a run's stage that were halted; return how many. Those of other stages are planned again."""
    halted = _halted(run_id)
    jobs = _move(session, (*halted, Job.stage == stage), JobState.QUEUED, actor, _AGAIN)
    session.execute(update(Job).where(*halted).values(error=None).execution_options(synchronize_session=False))
    return jobs


def halted(session: Session, run_id: int, stage: str) -> str | None:
    """Why jobs of a stage were halted; None if none is."""
    why = select(Job.error).where(*_halted(run_id), Job.stage == stage)
    return session.scalars(why.order_by(Job.id).limit(1)).first()


def _halted(run_id: int) -> tuple[ColumnElement[bool], ...]:
    is_for_budget = Job.error.startswith(f"{expenses.BUDGET}:")
    return Job.run_id == run_id, Job.state == JobState.CANCELLED, is_for_budget


def release(session: Session, job: Claim, *, owner: str) -> bool:
    """Give a job back unfinished without counting an attempt, because the worker is stopping."""
    attempts = case((Job.attempts > 0, Job.attempts - 1), else_=0)
    return _end(session, job, JobState.QUEUED, owner, {"attempts": attempts})


def postpone(session: Session, run_id: int, queue: str, pause: timedelta | None) -> None:
    """Delay the waiting jobs of a run's queue from now on; None removes the delay."""
    not_before = null() if pause is None else now(pause)
    waiting = Job.run_id == run_id, Job.queue == queue, Job.state == JobState.QUEUED
    session.execute(
        update(Job).where(*waiting).values(not_before=not_before).execution_options(synchronize_session=False)
    )


class ModelJobs(NamedTuple):
    """The jobs of one model in a stage of a run; without a teacher or scorer, the stage has only one."""

    stage: str
    teacher_id: int | None
    scorer_id: int | None


def turn(session: Session, run_id: int, of: ModelJobs, *, queue: str, gpus: int) -> None:
    """Move the unfinished jobs of one model in a run to another queue, because the model is reached differently now.

    Waiting ones can be claimed at once. A running one is released by its holder, see `release_turned`.
    """
    session.execute(
        update(Job)
        .where(*_of_model(run_id, of))
        .values(queue=queue, gpus=gpus, not_before=null(), dispatched_at=null())
        .execution_options(synchronize_session=False)
    )


def queues(session: Session, run_id: int) -> list[tuple[ModelJobs, str]]:
    """The unfinished jobs of a run by model, with their queue; locks the jobs."""
    jobs = select(Job.stage, Job.teacher_id, Job.scorer_id, Job.queue).where(
        Job.run_id == run_id, Job.state != JobState.DONE
    )
    found = session.execute(jobs.order_by(Job.id).with_for_update())
    return list(dict.fromkeys((ModelJobs(row.stage, row.teacher_id, row.scorer_id), row.queue) for row in found))


def _of_model(run_id: int, of: ModelJobs) -> tuple[ColumnElement[bool], ...]:
    is_of = Job.teacher_id.is_not_distinct_from(of.teacher_id), Job.scorer_id.is_not_distinct_from(of.scorer_id)
    return Job.run_id == run_id, Job.stage == of.stage, *is_of, Job.state != JobState.DONE


def turned(session: Session, held: Collection[Claim], *, is_moved: bool = False) -> set[int]:
    """The ids of held jobs to hand back: moved to another queue and, unless `is_moved`, those of stopped runs."""
    claims = {claim.id: claim for claim in held}
    columns = Job.id, Job.fence, Job.queue, Job.run_id.in_(STOPPED).label("is_stopped")
    mine = [(row, claims[row.id]) for row in session.execute(select(*columns).where(Job.id.in_(claims)))]
    ours = [(row, was.queue) for row, was in mine if row.fence == was.fence]
    return {row.id for row, queue in ours if row.queue != queue or (row.is_stopped and not is_moved)}


def release_turned(session: Session, job: Claim, *, owner: str) -> bool:
    """Release a job that is to be handed back, see `turned`, without counting an attempt; False if it is not."""
    session.execute(select(Job.id).where(Job.id == job.id).with_for_update())  # or it might be moved after the look
    return bool(turned(session, [job])) and release(session, job, owner=owner)


def release_unknown(session: Session, *, owner: str, known: Collection[int]) -> int:
    """Release jobs that an owner holds without knowing: the claim was committed, but its reply was lost.

    Returns how many.
    """
    attempts = case((Job.attempts > 0, Job.attempts - 1), else_=0)
    released = session.execute(
        update(Job)
        .where(Job.owner == owner, Job.state == JobState.RUNNING, Job.id.not_in(known))
        .values(state=JobState.QUEUED, lease_until=null(), attempts=attempts)
        .returning(Job.id, Job.run_id, Job.fence)
        .execution_options(synchronize_session=False)
    ).all()
    reason = {"reason": "claim not confirmed"}
    bulk.insert_new(session, Event, [_event(job, JobState.QUEUED, owner, reason) for job in released])
    return len(released)


def stop_cancelled(session: Session, job: Claim, *, owner: str) -> bool:
    """Let the holder end a job whose cancellation was requested; False if it was not, or the lease was lost."""
    asked = select(Job.id).where(Job.id == job.id, Job.cancel_requested)
    if session.scalars(asked).one_or_none() is None:
        return False
    return _end(session, job, JobState.CANCELLED, owner, {"finished_at": now()})


def sweep(
    session: Session, *, actor: str, dead_owners: Collection[str] = (), spare_expired: bool = False
) -> list[Swept]:
    """Take back jobs whose lease expired or whose owner is known to be dead.

    An expired lease counts as an attempt, because the cause is unknown; a job without attempts left fails.
    A dead owner was killed, which does not count against the job.

    spare_expired: take only the dead owners' jobs, since leases could not be renewed while the database was down.
    """
    is_dead = Job.owner.in_(dead_owners)
    columns = Job.id, Job.owner, Job.fence, Job.attempts, Job.max_attempts, Job.run_id, Job.cancel_requested
    times = Job.heartbeat_at, now().label("at")
    lost = session.execute(
        select(*columns, *times, is_dead.label("is_dead"))
        .where(Job.state == JobState.RUNNING, is_dead if spare_expired else or_(Job.lease_until < now(), is_dead))
        .with_for_update(skip_locked=True)
    ).all()
    swept = [_take_back(session, job) for job in lost]
    events = [
        _event(job, taken.state, actor, {"owner": job.owner, "reason": _reason(job), "silent_seconds": _silence(job)})
        for job, taken in zip(lost, swept, strict=True)
    ]
    bulk.insert_new(session, Event, events)
    return swept


def cancel(session: Session, run_id: int, *, actor: str, job_ids: Collection[int] | None = None) -> int:
    """Cancel a run's jobs, or some of them: waiting ones at once, running ones at their next heartbeat.

    Returns the number of jobs concerned.
    """
    mine = [Job.run_id == run_id] + ([] if job_ids is None else [Job.id.in_(job_ids)])
    waits = Job.state == JobState.QUEUED
    # A single statement, so that jobs claimed or released concurrently are handled in their current state.
    jobs = session.execute(
        update(Job)
        .where(*mine, Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
        .values(
            state=case((waits, literal(JobState.CANCELLED, Job.state.type)), else_=Job.state),
            finished_at=case((waits, now()), else_=Job.finished_at),
            cancel_requested=case((waits, Job.cancel_requested), else_=true()),
        )
        .returning(Job.id, Job.run_id, Job.fence, Job.state)
        .execution_options(synchronize_session=False)
    ).all()
    over = [job for job in jobs if job.state == JobState.CANCELLED]
    bulk.insert_new(session, Event, [_event(job, JobState.CANCELLED, actor, {}, was=JobState.QUEUED) for job in over])
    return len(jobs)


def retry(session: Session, run_id: int, stage: str, *, actor: str) -> int:
    """Requeue the failed and cancelled jobs of a run's stage with all their attempts; return how many.

    Failed jobs of other stages are cancelled: when the run reaches such a stage, it plans what is missing.
    """
    mine, failed = Job.run_id == run_id, Job.state == JobState.FAILED
    over = mine, Job.stage == stage, failed | (Job.state == JobState.CANCELLED)
    _move(session, (mine, Job.stage != stage, failed), JobState.CANCELLED, actor, {})
    return _move(session, over, JobState.QUEUED, actor, _AGAIN)


def _move(
    session: Session, which: Sequence[ColumnElement[bool]], state: JobState, actor: str, values: Mapping[str, Any]
) -> int:
    jobs = session.execute(select(Job.id, Job.run_id, Job.fence, Job.state).where(*which).with_for_update()).all()
    bulk.insert_new(session, Event, [_event(job, state, actor, {"reason": "retry"}, was=job.state) for job in jobs])
    session.execute(update(Job).where(*which).values(state=state, **values))
    return len(jobs)


def _take_back(session: Session, job: Any) -> Swept:
    is_spent = not job.is_dead and job.attempts >= job.max_attempts
    values: dict[str, Any] = {"state": JobState.QUEUED, "error": f"{_reason(job)}; its worker was {job.owner}"}
    if job.cancel_requested:
        values |= {"state": JobState.CANCELLED, "finished_at": now()}
    elif is_spent:
        values |= {"state": JobState.FAILED, "finished_at": now()}
    elif job.is_dead:
        values["attempts"] = max(job.attempts - 1, 0)
    session.execute(_held(job.id, job.fence).values(lease_until=null(), **values))
    expenses.close(session, job.id, job.fence)
    return Swept(job.id, job.run_id, values["state"])


def _reason(job: Any) -> str:
    return "owner died" if job.is_dead else "lease expired"


def _silence(job: Any) -> float | None:
    """Seconds between the worker's last heartbeat and the sweep: the time lost."""
    return (job.at - job.heartbeat_at).total_seconds() if job.heartbeat_at else None


def is_claimable() -> ColumnElement[bool]:
    """Whether a waiting job can be claimed now."""
    return and_(or_(Job.not_before.is_(None), Job.not_before <= now()), Job.run_id.not_in(STOPPED))


def _end(session: Session, job: Claim, state: JobState, actor: str, values: Mapping[str, Any]) -> bool:
    ended = session.execute(_held(job.id, job.fence).values(state=state, lease_until=null(), **values))
    if not _rows(ended):
        return False
    expenses.close(session, job.id, job.fence)
    detail = {"error": values["error"]} if isinstance(values.get("error"), str) else {}
    bulk.insert_new(session, Event, [_event(job, state, actor, detail)])
    return True


def _held(job_id: int, fence: int) -> Update:
    """An update that takes effect only if the job is still held under this fence."""
    return (
        update(Job)
        .where(Job.id == job_id, Job.fence == fence, Job.state == JobState.RUNNING)
        .execution_options(synchronize_session=False)
    )


def _event(
    job: Any, state: JobState, actor: str, detail: Mapping[str, Any], *, was: JobState = JobState.RUNNING
) -> dict[str, Any]:
    return {
        "actor": actor,
        "run_id": job.run_id,
        "job_id": job.id,
        "fence": job.fence,
        "from_state": was.value,
        "to_state": state.value,
        "detail": dict(detail),
    }


def _rows(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount
