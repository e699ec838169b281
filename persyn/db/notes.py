"""Events about a run as a whole that leave its state as it is: note something, and read what was noted."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.catalog import Run
from persyn.db.work import Event


def note(session: Session, run: Run, detail: dict[str, Any], *, actor: str) -> None:
    """Record an event in the current transaction. detail: plain values; the first key says what kind it is."""
    event = {"actor": actor, "run_id": run.id, "from_state": run.state, "to_state": run.state, "detail": detail}
    bulk.insert_new(session, Event, [event])


def noted(session: Session, run: Run, key: str, *, since: str | None = None) -> list[Any]:
    """What a run's events have under a key of their detail, in order.

    since: only after the last event with this key, if there is one.
    """
    events = select(Event.detail).where(Event.run_id == run.id, Event.job_id.is_(None)).order_by(Event.id)
    found: list[Any] = []
    for detail in session.scalars(events):
        if since in detail:
            found = []
        if key in detail:
            found.append(detail[key])
    return found


def last_at(session: Session, run: Run, key: str) -> datetime | None:
    """When something was last noted under a key; None if it never was."""
    events = select(Event.at, Event.detail).where(Event.run_id == run.id, Event.job_id.is_(None))
    return next((at for at, detail in session.execute(events.order_by(Event.id.desc())) if key in detail), None)
