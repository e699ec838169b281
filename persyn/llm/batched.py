"""An engine made of a function that computes a list of requests, for models that work in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from persyn.llm.protocols import Request, Result


class Batched:
    """Collect requests, hand them over a chunk at a time, pass on each batch of results as it comes.

    compute: takes a chunk of at most `chunk` requests and yields lists of results, in any order and
             each of them once; free to sort the chunk by length.
    """

    def __init__(self, compute: Callable[[list[Request]], Iterator[list[Result]]], *, version: str, chunk: int) -> None:
        self.version = version
        #: Twice a chunk: the next one is complete when the present one ends.
        self.window = 2 * chunk
        self._compute = compute
        self._chunk = chunk
        self._waiting: deque[Request] = deque()
        self._running: Iterator[list[Result]] = iter(())
        self._unfinished = 0

    @property
    def pending(self) -> int:
        """How many requests were submitted and are not finished."""
        return self._unfinished

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests; nothing is computed yet."""
        self._waiting.extend(requests)
        self._unfinished += len(requests)

    def step(self) -> list[Result]:
        """Compute one batch; start on the next chunk when the present one is done."""
        results = next(self._running, None)
        if results is None:
            chunk = [self._waiting.popleft() for _ in range(min(self._chunk, len(self._waiting)))]
            self._running = self._compute(chunk)
            results = next(self._running, [])
        self._unfinished -= len(results)
        return results
