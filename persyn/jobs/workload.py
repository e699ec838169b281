"""What waits in the queues, and who works them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import and_, case, func, or_, select, update
from sqlalchemy.orm import Session

from persyn.db.time import now
from persyn.db.work import Job, JobState
from persyn.jobs import queue

#: How long a worker without a job is still counted among those that share the next ones.
_LATELY = timedelta(seconds=20)


@dataclass(frozen=True, slots=True)
class Backlog:
    """The claimable work of one queue.

    workers:  how many owners hold a job of it.
    is_light: its model needs neither GPUs nor the CPU for itself.
    priority: that of its first job; lower values are claimed first.
    """

    queue: str
    gpus: int
    jobs: int
    prompts: int
    workers: int
    is_light: bool = False
    priority: int = 0


def backlogs(session: Session, *, run_id: int | None = None, besides: str | None = None) -> list[Backlog]:
    """The queues with claimable jobs, and the number of workers of each.

    besides: an owner that does not count as a worker.
    """
    is_due = and_(Job.state == JobState.QUEUED, queue.is_claimable())
    jobs = func.sum(case((is_due, 1), else_=0))
    owner = case((and_(Job.state == JobState.RUNNING, Job.owner != (besides or "")), Job.owner))
    query = (
        select(
            Job.queue,
            func.max(Job.gpus),
            jobs,
            func.sum(case((is_due, Job.n_prompts), else_=0)),
            func.count(owner.distinct()),
            func.max(case((Job.is_light, 1), else_=0)),
            func.min(case((is_due, Job.priority))),
        )
        .where(Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
        .group_by(Job.queue)
        .having(jobs > 0)
    )
    if run_id is not None:
        query = query.where(Job.run_id == run_id)
    return [
        Backlog(name, int(gpus), int(waiting), int(prompts), int(workers), bool(is_light), int(priority))
        for name, gpus, waiting, prompts, workers, is_light, priority in session.execute(query)
    ]


def share(session: Session, *, on_gpus: bool, run_id: int | None = None) -> float:
    """Prompts left per worker, including those in jobs that are held.

    A worker counts if it holds a job or did a moment ago, because between two stages nobody holds one.

    on_gpus: count models that need GPUs and the workers that run them; otherwise the others.
    """
    mine = [Job.gpus > 0 if on_gpus else Job.gpus == 0]
    mine += [] if run_id is None else [Job.run_id == run_id]
    is_held = Job.state == JobState.RUNNING
    is_left = or_(is_held, and_(Job.state == JobState.QUEUED, queue.is_claimable()))
    left = session.scalar(select(func.sum(Job.n_prompts)).where(is_left, *mine)) or 0
    is_there = or_(is_held, Job.heartbeat_at > now(-_LATELY))
    workers = session.scalar(select(func.count(Job.owner.distinct())).where(is_there, *mine)) or 0
    return left / max(workers, 1)


def due(session: Session, name: str, *, limit: int) -> list[int]:
    """Claimable jobs of a queue; those without a message, or with the oldest one, come first."""
    ordered = select(Job.id).where(Job.queue == name, Job.state == JobState.QUEUED, queue.is_claimable())
    return list(
        session.scalars(ordered.order_by(Job.dispatched_at.asc().nulls_first(), Job.priority, Job.id).limit(limit))
    )


def note_sent(session: Session, job_ids: Collection[int]) -> None:
    """Record that a message was sent for these jobs."""
    session.execute(update(Job).where(Job.id.in_(job_ids)).values(dispatched_at=now()))


def is_drained(session: Session) -> bool:
    """Whether no job is waiting, claimable now or later, apart from those of runs that have stopped."""
    waiting = select(Job.id).where(Job.state == JobState.QUEUED, Job.run_id.not_in(queue.STOPPED))
    return session.scalars(waiting.limit(1)).one_or_none() is None


def holders(session: Session) -> dict[int, set[str]]:
    """The owners that hold an unexpired lease, by run."""
    held = select(Job.run_id, Job.owner).where(Job.state == JobState.RUNNING, Job.lease_until > now()).distinct()
    found: dict[int, set[str]] = {}
    for run_id, owner in session.execute(held):
        found.setdefault(run_id, set()).add(str(owner))
    return found


def owners(session: Session) -> list[str]:
    """The owners of running jobs."""
    return list(session.scalars(select(Job.owner).where(Job.state == JobState.RUNNING).distinct()))
