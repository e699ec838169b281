"""The lead among dispatchers: a lease of a few seconds in the database, under a fence that each write checks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import CursorResult, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from persyn.db.time import now
from persyn.db.work import Leader

#: How long a leader that gives no sign keeps the lead. A tick of a second renews it.
LEASE = timedelta(seconds=5)


class Lead:
    """One dispatcher's part in it: whether it leads is decided by the database, and by its clock.

    owner: who asks; see `owner.name`.
    """

    def __init__(self, owner: str, *, lease: timedelta = LEASE) -> None:
        self._owner = owner
        self._lease = lease
        self._fence: int | None = None

    def take(self, session: Session) -> bool:
        """Keep the lead, or take it where nobody's lease runs; False while another leads."""
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
        """Check the fence before anything is written, in the same transaction; False: write nothing.

        Nobody else takes the lead before that transaction is over.
        """
        return self._set(session, now(self._lease))

    def resign(self, session: Session) -> None:
        """Let the next one lead at once."""
        if self._fence is not None:
            self._set(session, now())
            self._fence = None

    def _set(self, session: Session, until: now) -> bool:
        mine = update(Leader).where(Leader.fence == self._fence, Leader.owner == self._owner)
        held: Any = session.execute(mine.values(lease_until=until).execution_options(synchronize_session=False))
        assert isinstance(held, CursorResult)
        return bool(held.rowcount)
