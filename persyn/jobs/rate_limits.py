"""Hold limits of requests and tokens per minute over all workers, by a schedule in the store.

It is the generic cell rate algorithm (ITU-T I.371): each request moves the time up to which an account's limit is used
up, and none is permitted while that time is more than a moment ahead of the clock. What a dead worker was permitted and
did not send is lost for that moment only.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.time import now
from persyn.db.work import RateLimit
from persyn.llm.rates import Cost, Limits

#: How far ahead of the clock a limit may be used up, in seconds. In any period, an account thus exceeds its limit by at
#: most what it may use in this time, and one request.
AHEAD_SECONDS = 1.0


def take(session: Session, limits: Limits, costs: Sequence[Cost], *, unused_tokens: int = 0) -> int:
    """Permit the first requests of a list, to be sent now; returns how many.

    unused_tokens: how many tokens fewer than estimated (more, if negative) earlier requests have used.
    """
    at = session.scalars(select(now())).one()
    row = {"account": limits.account, "requests_until": at, "tokens_until": at}
    bulk.insert_new(session, RateLimit, [row])
    used = session.get_one(RateLimit, limits.account, with_for_update=True, populate_existing=True)
    at = session.scalars(select(now())).one()
    requests_ahead = max(0.0, (used.requests_until - at).total_seconds())
    tokens_ahead = max(0.0, (used.tokens_until - at).total_seconds())
    tokens_ahead = max(0.0, tokens_ahead - _seconds(unused_tokens, limits.tokens_per_minute))
    permitted = 0
    for cost in costs:
        if max(requests_ahead, tokens_ahead) > AHEAD_SECONDS:
            break
        permitted += 1
        requests_ahead += _seconds(cost.requests, limits.requests_per_minute)
        tokens_ahead += _seconds(cost.tokens, limits.tokens_per_minute)
    used.requests_until = at + timedelta(seconds=requests_ahead)
    used.tokens_until = at + timedelta(seconds=tokens_ahead)
    session.flush()
    return permitted


def _seconds(count: int, per_minute: int | None) -> float:
    """How long a limit takes to allow this many."""
    return 60.0 * count / per_minute if per_minute else 0.0
