"""Build an engine from a function that computes a list of requests, for models that work in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from persyn.llm.protocols import Request, Result


class Batched:
    """Collect requests, compute them chunk by chunk, and return each batch of results when it is ready.

    compute: takes a chunk of at most `chunk` requests and yields lists of results, in any order, each
             result exactly once; it may sort the chunk by length.
    """

    def __init__(self, compute: Callable[[list[Request]], Iterator[list[Result]]], *, version: str, chunk: int) -> None:
        self.version = version
        #: Two chunks, so that the next one is complete when the current one ends.
        self.window = 2 * chunk
        self._compute = compute
        self._chunk = chunk
        self._waiting: deque[Request] = deque()
        self._running: Iterator[list[Result]] = iter(())
        self._unfinished = 0

    @property
    def pending(self) -> int:
        """The number of submitted and unfinished requests."""
        return self._unfinished

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests without computing anything yet."""
        self._waiting.extend(requests)
        self._unfinished += len(requests)

    def step(self) -> list[Result]:
        """Compute one batch; start the next chunk when the current one is done."""
        results = next(self._running, None)
        if results is None:
            chunk = [self._waiting.popleft() for _ in range(min(self._chunk, len(self._waiting)))]
            self._running = self._compute(chunk)
            results = next(self._running, [])
        self._unfinished -= len(results)
        return results
