"""Record the batches of requests that were sent to a provider, so that none is sent twice."""

from __future__ import annotations

import uuid

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session, aliased

from persyn.db.time import now
from persyn.db.work import Batch, Job, JobState


def take(session: Session, job_id: int, place: str) -> Batch | None:
    """The first batch with requests of a job that was begun at this place and not yet collected; it is the job's now.

    It may have been sent for another job of the same part of the run, which was cancelled or failed and planned again.
    Call it in a transaction that holds the job's lease.
    """
    job, was = session.get_one(Job, job_id), aliased(Job)
    is_over = was.state.in_((JobState.CANCELLED, JobState.FAILED, JobState.DONE))
    is_of_it = (
        was.run_id == job.run_id,
        was.stage == job.stage,
        was.teacher_id == job.teacher_id,
        was.first_prompt_id <= job.last_prompt_id,
        was.last_prompt_id >= job.first_prompt_id,
    )
    found = session.scalars(
        select(Batch)
        .join(was, was.id == Batch.job_id)
        .where(Batch.place == place, Batch.collected_at.is_(None), or_(was.id == job_id, and_(is_over, *is_of_it)))
        .order_by(Batch.created_at, Batch.key)
        .limit(1)
    ).one_or_none()
    if found is not None:
        found.job_id = job_id
        session.flush()
    return found


def begin(session: Session, job_id: int, place: str, requests: int) -> str:
    """Record a batch before it is created at the provider; return the key to create it with."""
    key = uuid.uuid4().hex
    session.add(Batch(key=key, job_id=job_id, place=place, requests=requests, finished=0))
    return key


def note_created(session: Session, key: str, provider_id: str) -> None:
    """Record the provider's id of a batch."""
    session.execute(update(Batch).where(Batch.key == key).values(provider_id=provider_id))


def note_finished(session: Session, key: str, finished: int) -> None:
    """Record how many of a batch's requests the provider has finished."""
    session.execute(update(Batch).where(Batch.key == key).values(finished=finished))


def note_collected(session: Session, key: str, *, fence: int) -> None:
    """Record that a batch's results are stored, unless its job was given back or cancelled before they all were.

    fence: of the claim that stored them.
    """
    is_kept = Job.fence == fence, Job.state.in_((JobState.RUNNING, JobState.DONE))
    is_own = select(Job.id).where(Job.id == Batch.job_id, *is_kept).exists()
    session.execute(update(Batch).where(Batch.key == key, is_own).values(collected_at=now()))
