"""Which servers are waited for, by run and queue: in the store, so that a wait survives whoever began it."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import CursorResult, delete, select
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.time import now
from persyn.db.work import Outage

#: How long a server is left alone: a part of the time it has been away for, within bounds.
_SHARE = 4
_SHORTEST, _LONGEST = timedelta(seconds=2), timedelta(seconds=60)


def note(session: Session, run_id: int, queue: str, error: str, *, limit: timedelta) -> timedelta | None:
    """Note that a queue's server is away; how long it is left alone, or None when it was waited for long enough.

    limit: how long it is waited for, from the first note on.
    """
    at = session.scalars(select(now())).one()
    row = {"run_id": run_id, "queue": queue, "since": at, "retry_at": at, "error": error}
    bulk.insert_new(session, Outage, [row])
    outage = session.get(Outage, (run_id, queue), with_for_update=True, populate_existing=True)
    if outage is None:  # it answered somebody else this very moment
        return _SHORTEST
    left = limit - (at - outage.since)
    if left <= timedelta(0):
        return None  # and stays noted: others that wait for it have waited for as long
    pause = min(max((at - outage.since) / _SHARE, _SHORTEST), _LONGEST, left)
    outage.error, outage.retry_at = error, at + pause
    session.flush()
    return pause


def over(session: Session, run_id: int, queue: str) -> bool:
    """Note that a queue's server answers; whether it was waited for."""
    ended = session.execute(
        delete(Outage)
        .where(Outage.run_id == run_id, Outage.queue == queue)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(ended, CursorResult)
    return bool(ended.rowcount)


def forget(session: Session, run_id: int) -> list[str]:
    """Begin every wait of a run anew, should its servers still be away; the queues that waited."""
    ended = delete(Outage).where(Outage.run_id == run_id).returning(Outage.queue)
    return list(session.scalars(ended.execution_options(synchronize_session=False)))
