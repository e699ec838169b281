"""Record which servers are being waited for, by run and queue, so that a wait survives the process that began it."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import CursorResult, delete, select
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.time import now
from persyn.db.work import Outage

#: A server is retried after this fraction (1/4) of its outage so far, within bounds.
_SHARE = 4
_SHORTEST, _LONGEST = timedelta(seconds=2), timedelta(seconds=60)


def note(session: Session, run_id: int, queue: str, error: str, *, limit: timedelta) -> timedelta | None:
    """Record that a queue's server is unavailable; return the pause before the next try, or None past the limit.

    limit: how long to wait in total, from the first record on.
    """
    at = session.scalars(select(now())).one()
    row = {"run_id": run_id, "queue": queue, "since": at, "retry_at": at, "error": error}
    bulk.insert_new(session, Outage, [row])
    outage = session.get(Outage, (run_id, queue), with_for_update=True, populate_existing=True)
    if outage is None:  # the server has just answered another worker
        return _SHORTEST
    left = limit - (at - outage.since)
    if left <= timedelta(0):
        return None  # the row is kept, so that other workers stop waiting too
    pause = min(max((at - outage.since) / _SHARE, _SHORTEST), _LONGEST, left)
    outage.error, outage.retry_at = error, at + pause
    session.flush()
    return pause


def over(session: Session, run_id: int, queue: str) -> bool:
    """Record that a queue's server answers again; return whether it was being waited for."""
    ended = session.execute(
        delete(Outage)
        .where(Outage.run_id == run_id, Outage.queue == queue)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(ended, CursorResult)
    return bool(ended.rowcount)


def forget(session: Session, run_id: int) -> list[str]:
    """Restart every wait of a run, in case its servers are still unavailable; return the queues that were waiting."""
    ended = delete(Outage).where(Outage.run_id == run_id).returning(Outage.queue)
    return list(session.scalars(ended.execution_options(synchronize_session=False)))
