"""Which request kills an engine? Give each new engine fewer of those that were in it, until one is alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

#: Each death leaves this much fewer requests to the next engine at once.
_NARROWING = 4

Key: TypeAlias = tuple[int, int]
"""A request of a job: (job id, request id)."""


class Suspicion:
    """Counts an engine's deaths until the requests it died with are all finished.

    The first death narrows nothing: most are somebody else's doing, an operator's or the kernel's.
    """

    def __init__(self) -> None:
        self._suspects: set[Key] = set()
        self._deaths = 0
        self._limit: int | None = None

    def limit(self, window: int) -> int:
        """How many requests an engine with this window may have at once."""
        return window if self._limit is None else min(window, self._limit)

    def finished(self, key: Key) -> None:
        """A request got its result; with the last suspect the suspicion ends."""
        self._suspects.discard(key)
        if not self._suspects:
            self._deaths, self._limit = 0, None

    def forget(self, job_id: int) -> None:
        """A job is gone, and its requests with it."""
        for key in [key for key in self._suspects if key[0] == job_id]:
            self.finished(key)

    def died(self, flying: Collection[Key]) -> Key | None:
        """An engine died with these requests in hand; the guilty one, when it was alone a second time."""
        self._deaths += 1
        if self._deaths > 1 and len(flying) == 1:
            return next(iter(flying))
        self._suspects = set(flying)
        if self._deaths > 1:
            self._limit = max(1, len(flying) // _NARROWING)
        return None
