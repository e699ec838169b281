"""Record the batches of requests that were sent to a provider, so that none is sent twice."""

from __future__ import annotations

import uuid

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from persyn.db.time import now
from persyn.db.work import Batch, Job


def open_of(session: Session, job_id: int) -> Batch | None:
    """The batch of a job that was begun and not yet collected."""
    return session.scalars(select(Batch).where(Batch.job_id == job_id, Batch.collected_at.is_(None))).one_or_none()


def begin(session: Session, job_id: int, requests: int) -> str:
    """Record a batch before it is created at the provider; return the key to create it with."""
    key = uuid.uuid4().hex
    session.add(Batch(key=key, job_id=job_id, requests=requests, finished=0))
    return key


def note_created(session: Session, key: str, provider_id: str) -> None:
    """Record the provider's id of a batch."""
    session.execute(update(Batch).where(Batch.key == key).values(provider_id=provider_id))


def note_finished(session: Session, key: str, finished: int) -> None:
    """Record how many of a batch's requests the provider has finished."""
    session.execute(update(Batch).where(Batch.key == key).values(finished=finished))


def note_collected(session: Session, key: str, *, fence: int) -> None:
    """Record that a batch's results are stored, unless another worker has claimed its job since.

    fence: of the claim that stored them.
    """
    is_own = select(Job.id).where(Job.id == Batch.job_id, Job.fence == fence).exists()
    session.execute(update(Batch).where(Batch.key == key, is_own).values(collected_at=now()))
