"""What takes long to count: counted once however many look, beside the pages, and kept a while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy.orm import Session

from persyn.db.connect import Database

#: A count is kept for so many seconds, and at least for so many times as long as it took.
_LEAST_SECONDS, _SHARE = 1.5, 10
#: How long a page waits for a count that is a little newer than what it has.
_NEWER_SECONDS = 0.02
#: A count is of long ago after so many seconds.
OLD_SECONDS = 5.0
#: Counts at a time, and counts that are remembered.
_AT_ONCE, _MOST = 4, 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Counted(Generic[T]):
    """A count, how many seconds old it is, and whether a newer one is on its way."""

    value: T
    age: float
    is_renewed: bool

    @property
    def is_old(self) -> bool:
        """Whether who sees it should look again."""
        return self.is_renewed and self.age > OLD_SECONDS


class Kept:
    """Counts of one store.

    database: where they are read.
    patience: how long a page waits for a count that it lacks, or has only of long ago, in seconds.
    clock:    seconds; tests pass their own.
    """

    def __init__(
        self, database: Database, *, patience: float = 0.1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()
        self._free = threading.Semaphore(_AT_ONCE)

    def get(self, key: Hashable, count: Callable[[Session], T]) -> Counted[T] | None:
        """The newest count of this name; None while the first one goes on. Raises what counting raised."""
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
            while len(self._slots) > _MOST:
                self._slots.popitem(last=False)
            if slot.work is None and self._clock() >= slot.count_at and self._free.acquire(blocking=False):
                slot.work = threading.Event()
                # Daemons: whoever ends the console does not wait for a count of millions of rows.
                threading.Thread(target=self._count, args=(slot, count), name=f"count {key}", daemon=True).start()
            work, is_old = slot.work, slot.found is None or self._clock() - slot.counted_at > OLD_SECONDS
        if work is not None:
            work.wait(self._patience if is_old else _NEWER_SECONDS)
        with self._lock:
            if slot.error is not None:
                error, slot.error = slot.error, None
                raise error
            if slot.found is None:
                return None
            return Counted(slot.found[0], self._clock() - slot.counted_at, slot.work is not None)

    def _count(self, slot: _Slot, count: Callable[[Session], Any]) -> None:
        began, found, error = self._clock(), slot.found, None
        try:
            with self._database.read() as session:
                found = (count(session),)
        except Exception as raised:  # whoever asked is told
            error = raised
        ended = self._clock()
        with self._lock:
            assert slot.work is not None
            slot.found, slot.error, slot.counted_at = found, error, ended if error is None else slot.counted_at
            slot.count_at = ended + max(_LEAST_SECONDS, _SHARE * (ended - began))
            if error is not None:
                slot.count_at = ended
            slot.work.set()
            slot.work = None
        self._free.release()


class _Slot:
    """One count: found (a value in a tuple) at a time, and the work on the next one, if any."""

    def __init__(self) -> None:
        self.found: tuple[Any] | None = None
        self.error: Exception | None = None
        self.counted_at = 0.0
        self.count_at = float("-inf")
        self.work: threading.Event | None = None
