"""The addresses of one model: which of them gets the next request, and which is left out because it fails."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from persyn.llm.teachers.complaints import RefusedError, RetryableError
from persyn.llm.teachers.concurrency import Concurrency

#: A replica that fails this many requests in a row is left out; one that accepts no connection, at once.
_SICK_AFTER = 3
#: How long it is left out, doubled with each probe that fails.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
#: Statuses of a server that is too busy; the last is Anthropic's.
_BUSY = {429, 503, 529}


@dataclass(slots=True, eq=False)
class Replica:
    """One address, what it is working on, and its health."""

    url: str
    concurrency: Concurrency
    in_flight: int = 0
    #: The server asked for a pause until this time of the event loop.
    resume_at: float = 0.0
    #: Failures since the last answer.
    failures: int = 0
    is_sick: bool = False
    #: How long to leave it out before the next probe, in seconds.
    pause_seconds: float = _FIRST_PAUSE_SECONDS
    used_at: float = field(default=0.0)

    def is_free(self, now: float) -> bool:
        """Whether it may be sent another request now."""
        return self.in_flight < self.concurrency.limit and now >= self.resume_at

    def answered(self, sent_at: float, now: float, tokens: int | None) -> None:
        """It answered a request."""
        self.is_well()
        self.concurrency.answered(sent_at, now, tokens)

    def is_well(self) -> None:
        """It answers."""
        self.failures, self.is_sick, self.pause_seconds = 0, False, _FIRST_PAUSE_SECONDS

    def failed(self, error: RetryableError | RefusedError, sent_at: float, now: float) -> bool:
        """It did not answer a request; returns whether it is to be left out from now on."""
        self.failures += 1
        is_absent = False
        if isinstance(error, RetryableError):
            is_absent = error.is_absent
            # Rate limits are server-wide: pause all requests.
            self.resume_at = max(self.resume_at, now + error.pause_seconds)
            if error.status in _BUSY or error.is_late:
                self.concurrency.overloaded(sent_at, now)
        was_sick, self.is_sick = self.is_sick, self.is_sick or is_absent or self.failures >= _SICK_AFTER
        return self.is_sick and not was_sick

    def next_pause(self) -> float:
        """How long to leave it out before the next probe; each one is twice as long as the one before."""
        pause = self.pause_seconds
        self.pause_seconds = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return pause


class Replicas:
    """Gives requests to the replica with the smallest share of its places taken, first come first served."""

    def __init__(self, replicas: Sequence[Replica], loop: asyncio.AbstractEventLoop) -> None:
        self.all = replicas
        self._loop = loop
        self._waiting: deque[tuple[asyncio.Future[Replica], Collection[Replica]]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    def by_health(self) -> list[Replica]:
        """All of them, those that answer first."""
        return sorted(self.all, key=lambda replica: replica.failures)

    def usable(self) -> Sequence[Replica]:
        """Those that answer; all of them if none does."""
        return [replica for replica in self.all if not replica.is_sick] or self.all

    async def take(self, tried: Collection[Replica], *, is_first: bool) -> Replica | None:
        """A place at a replica, to be given back with `leave`; None if all usable ones were tried.

        is_first: before others that wait.
        """
        if all(replica in tried for replica in self.usable()):
            return None
        place: asyncio.Future[Replica] = self._loop.create_future()
        add = self._waiting.appendleft if is_first else self._waiting.append
        add((place, tried))
        self.share()
        return await place

    def leave(self, replica: Replica) -> None:
        """Give a place back."""
        replica.in_flight -= 1
        self.share()

    def share(self) -> None:
        """Give free places to those who wait."""
        now = self._loop.time()
        while self._waiting and (free := [replica for replica in self.usable() if replica.is_free(now)]):
            found = self._next(free)
            if found is None:
                break
            place, replica = found
            replica.in_flight += 1
            replica.used_at = now
            place.set_result(replica)
        self._wake_later(now)

    def _next(self, free: Sequence[Replica]) -> tuple[asyncio.Future[Replica], Replica] | None:
        """The first that waits for one of the free replicas, and the least loaded one for it."""
        usable = self.usable()
        for entry in self._waiting:
            place, tried = entry
            # One whose other replicas have failed meanwhile is asked again where it was before.
            is_stuck = all(replica in tried for replica in usable)
            mine = [replica for replica in free if is_stuck or replica not in tried]
            if place.done() or mine:
                self._waiting.remove(entry)
                if place.done():  # cancelled
                    return self._next(free)
                return place, min(mine, key=lambda each: (each.in_flight / each.concurrency.limit, each.used_at))
        return None

    def _wake_later(self, now: float) -> None:
        """Share places again when a pause is over."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        pauses = [replica.resume_at for replica in self.all if replica.resume_at > now]
        if self._waiting and pauses:
            self._alarm = self._loop.call_at(min(pauses), self.share)
