"""Cache slow counts: each is computed once in a background thread for all pages, and kept for a while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from sqlalchemy.orm import Session

from persyn.db.connect import Database

#: A count is reused for this many seconds, and at least for this multiple of the time it took.
_LEAST_SECONDS, _SHARE = 1.5, 20
#: How long a page waits for a count that is slightly newer than the cached one.
_NEWER_SECONDS = 0.02
#: A count older than this is shown as old.
OLD_SECONDS = 5.0
#: How long closing waits for a count that does not stop.
_CLOSE_SECONDS = 5.0
#: Concurrent counts, which compete with pages for the interpreter, and the number of cached counts.
_AT_ONCE, _MOST = 1, 256

T = TypeVar("T")
CountQuery: TypeAlias = Callable[[Session], Any]


@dataclass(frozen=True, slots=True)
class Counted(Generic[T]):
    """A count with its age in seconds, and whether a newer one is being computed."""

    value: T
    age: float
    is_renewed: bool

    @property
    def is_old(self) -> bool:
        """Whether a page showing it should be refreshed."""
        return self.is_renewed and self.age > OLD_SECONDS


class CountCache:
    """A cache of counts of one store.

    database: where they are read.
    patience: how long a page waits, in seconds, for counts that are missing or old.
    clock:    returns seconds; tests pass their own.
    """

    def __init__(
        self, database: Database, *, patience: float = 0.05, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[int | None, str], _Slot] = OrderedDict()
        self._free = threading.Semaphore(_AT_ONCE)
        self._is_closed = False

    def get(self, counts: Mapping[str, CountQuery], *, run_id: int | None = None) -> dict[str, Counted[Any] | None]:
        """The latest value of each count; None while it is computed for the first time. Re-raises errors of counting.

        counts: {name: function}.
        run_id: the run they belong to.
        """
        until = time.monotonic() + self._patience
        with self._lock:
            slots = {name: self._started((run_id, name), count) for name, count in counts.items()}
            waited = [(slot.work, self._lacks(slot)) for slot in slots.values() if slot.work is not None]
        for work, is_lacking in waited:
            left = max(until - time.monotonic(), 0.0)
            work.wait(left if is_lacking else min(left, _NEWER_SECONDS))
        with self._lock:
            return {name: self._found(slot) for name, slot in slots.items()}

    def close(self) -> None:
        """Stop counting and interrupt running queries."""
        with self._lock:
            self._is_closed = True
            working = [slot for slot in self._slots.values() if slot.thread is not None]
        until = time.monotonic() + _CLOSE_SECONDS
        for slot in working:
            # Repeated, because an interrupt between two queries has no effect.
            while slot.thread is not None and slot.thread.is_alive() and time.monotonic() < until:
                if (stop := slot.stop) is not None:
                    stop()
                slot.thread.join(0.05)

    def _started(self, key: tuple[int | None, str], count: CountQuery) -> _Slot:
        """The slot of a count; starts counting if it is due."""
        slot = self._slots.setdefault(key, _Slot())
        self._slots.move_to_end(key)
        while len(self._slots) > _MOST:
            self._slots.popitem(last=False)
        if slot.work is None and self._clock() >= slot.count_at and not self._is_closed:
            slot.work = threading.Event()
            slot.thread = threading.Thread(target=self._count, args=(slot, count), name=f"count {key}", daemon=True)
            slot.thread.start()
        return slot

    def _lacks(self, slot: _Slot) -> bool:
        return slot.found is None or self._clock() - slot.counted_at > OLD_SECONDS

    def _found(self, slot: _Slot) -> Counted[Any] | None:
        if slot.error is not None:
            error, slot.error = slot.error, None
            raise error
        if slot.found is None:
            return None
        return Counted(slot.found[0], self._clock() - slot.counted_at, slot.work is not None)

    def _count(self, slot: _Slot, count: CountQuery) -> None:
        with self._free:  # limits the number of concurrent counts
            if not self._is_closed:
                self._count_now(slot, count)

    def _count_now(self, slot: _Slot, count: CountQuery) -> None:
        began, found, error = self._clock(), slot.found, None
        try:
            with self._database.read() as session:
                driver: Any = session.connection().connection.driver_connection
                slot.stop = getattr(driver, "interrupt", None) or driver.cancel  # SQLite's, PostgreSQL's
                found = (count(session),)
        except Exception as raised:  # re-raised for whoever asks for the count
            error = raised
        ended = self._clock()
        with self._lock:
            assert slot.work is not None
            slot.found, slot.error, slot.counted_at = found, error, ended if error is None else slot.counted_at
            slot.count_at = ended + max(_LEAST_SECONDS, _SHARE * (ended - began))
            if error is not None:
                slot.count_at = ended  # the next request tries again
            slot.work.set()
            slot.work = slot.stop = None


class _Slot:
    """One count: its value in a tuple, when it was computed, and the work on the next value, if any."""

    def __init__(self) -> None:
        self.found: tuple[Any] | None = None
        self.error: Exception | None = None
        self.counted_at = 0.0
        self.count_at = float("-inf")
        self.work: threading.Event | None = None
        self.thread: threading.Thread | None = None
        self.stop: Callable[[], None] | None = None
