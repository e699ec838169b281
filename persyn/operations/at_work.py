"""Find out who works on runs."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy.orm import Session

from persyn.jobs import owner, workload

#: Workers named in a message.
_MOST = 3


def workers(session: Session, run_id: int | None = None) -> list[str]:
    """The workers that hold jobs under a live lease, of one run or any, without those known to be dead."""
    held = workload.holders(session)
    found = held.get(run_id, set()) if run_id is not None else set().union(*held.values())
    return sorted(found - set(owner.dead(found)))


def named(workers: Collection[str]) -> str:
    """A few workers in words."""
    names = [owner.short(worker) for worker in workers]
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
