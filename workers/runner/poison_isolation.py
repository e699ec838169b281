"""Isolate the request that kills an engine: after each death, fewer of the suspects run at once, until one is alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

#: After each death, the limit on concurrent requests is divided by this.
_NARROWING = 4

Key: TypeAlias = tuple[int, int]
"""A request of a job: (job id, request id)."""


class PoisonIsolation:
    """Counts an engine's deaths until all requests that it died with are finished.

    The first death has no effect: most are caused from outside, by an operator or the kernel.
    """

    def __init__(self) -> None:
        self._suspects: set[Key] = set()
        self._deaths = 0
        self._limit: int | None = None

    def limit(self, window: int) -> int:
        """The maximum number of concurrent requests for an engine with this window."""
        return window if self._limit is None else min(window, self._limit)

    def finished(self, key: Key) -> None:
        """A request has a result; when no suspects are left, the suspicion ends."""
        self._suspects.discard(key)
        if not self._suspects:
            self._deaths, self._limit = 0, None

    def forget(self, job_id: int) -> None:
        """Forget a job and its requests."""
        for key in [key for key in self._suspects if key[0] == job_id]:
            self.finished(key)

    def died(self, flying: Collection[Key]) -> Key | None:
        """An engine died with these requests in flight; returns the culprit, a request that was alone a second time."""
        self._deaths += 1
        if self._deaths > 1 and len(flying) == 1:
            return next(iter(flying))
        self._suspects = set(flying)
        if self._deaths > 1:
            self._limit = max(1, len(flying) // _NARROWING)
        return None
