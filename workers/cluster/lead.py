"""Elect the leading dispatcher: a lease of a few seconds in the database, with a fence checked by each write."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import CursorResult, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from persyn.db.time import now
from persyn.db.work import Leader

#: How long a silent leader keeps the lead; each tick, once per second, renews it.
LEASE = timedelta(seconds=5)


class Lead:
    """One dispatcher's candidacy; the database decides who leads, by its own clock.

    owner: this dispatcher's name; see `owner.name`.
    """

    def __init__(self, owner: str, *, lease: timedelta = LEASE) -> None:
        self._owner = owner
        self._lease = lease
        self._fence: int | None = None

    def take(self, session: Session) -> bool:
        """Renew the lead, or take it if no lease is valid; False while another dispatcher leads."""
        if self._fence is not None and self.hold(session):
            return True
        kind = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
        row = {"id": 1, "owner": self._owner, "fence": 1, "lease_until": now(self._lease)}
        taken = kind.insert(Leader).values(row)
        taken = taken.on_conflict_do_update(
            index_elements=["id"],
            set_={**row, "fence": Leader.fence + 1},
            where=Leader.lease_until < now(),
        )
        self._fence = session.scalar(taken.returning(Leader.fence))
        return self._fence is not None

    def hold(self, session: Session) -> bool:
        """Check the fence in the transaction that writes; if False, write nothing.

        No other dispatcher can take the lead before that transaction ends.
        """
        return self._set(session, now(self._lease))

    def resign(self, session: Session) -> None:
        """Let another dispatcher lead at once."""
        if self._fence is not None:
            self._set(session, now())
            self._fence = None

    def _set(self, session: Session, until: now) -> bool:
        mine = update(Leader).where(Leader.fence == self._fence, Leader.owner == self._owner)
        held: Any = session.execute(mine.values(lease_until=until).execution_options(synchronize_session=False))
        assert isinstance(held, CursorResult)
        return bool(held.rowcount)
