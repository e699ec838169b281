"""What the workers of one process share: its GPUs, whose turn they are, and which models cannot be had here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from persyn.jobs import owner

#: A model may keep its GPUs from one that waits for so many times as long as loading takes: what all the loading costs
#: is then a small share of the time.
_LOADS_A_TURN = 20
#: And for so long at least.
_TURN_SECONDS = 10.0
#: The longest wait for GPUs before the store is looked at again.
_MOMENT_SECONDS = 2.0
#: How often workers that are all at work look at what else waits.
_LOOK_SECONDS = 5.0


@dataclass(slots=True)
class _Holding:
    """What one worker has.

    gpus: those of its engine, running or not.
    planned: those of the model that it loads next, once that engine has ended; None when there is no such.
    since: when it was given them.
    """

    gpus: tuple[str, ...] = ()
    planned: tuple[str, ...] | None = None
    is_on_cpu: bool = False
    since: float = 0.0

    @property
    def occupied(self) -> set[str]:
        return {*self.gpus, *(self.planned or ())}


@dataclass(frozen=True, slots=True)
class _Want:
    """A queue that nobody works, and how many GPUs its model needs."""

    queue: str
    gpus: int
    since: float


class Ledger:
    """Gives each worker the GPUs of its model, and the CPU to one model at a time.

    A model that finds too few GPUs free waits. When it has waited for a turn, the GPUs that become free are kept for
    it, and workers that hold others are asked to give way, those that have had theirs longest first. That holds for
    a large model beside small ones, and for a small one behind a large one.

    gpus:  the ids; None: the environment's, all of them for whichever model it is.
    clock: seconds; tests pass their own.
    """

    def __init__(self, gpus: Collection[str] | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._gpus = None if gpus is None else tuple(gpus)
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._holdings: dict[str, _Holding] = {}
        self._wants: dict[str, _Want] = {}
        self._avoided: dict[str, float] = {}
        self._droppers: dict[str, Callable[[], bool]] = {}
        self._slowest_load = 0.0
        self._noted_at = 0.0

    def enlist(self, drop: Callable[[], bool]) -> str:
        """Take a worker in; returns its name, as an owner of leases.

        drop: ends its engine and gives back its GPUs unless it has work; says whether it did.
        """
        with self._changed:
            name = owner.name(len(self._droppers) or None)
            self._droppers[name] = drop
            return name

    def has_room(self, worker: str, queue: str, gpus: int) -> bool:
        """Whether a worker could have what a queue's model needs, now or once its own engine has ended."""
        with self._changed:
            if self._gpus is None:
                return True
            if not gpus:
                return not any(held.is_on_cpu for name, held in self._holdings.items() if name != worker)
            due = self._due()
            kept = due.gpus if due is not None and due.queue != queue else 0
            return len(self._to_be_had(worker)) - kept >= gpus

    def take(self, worker: str, queue: str, gpus: int) -> None:
        """Give a worker what `has_room` said there is; its engine keeps its own until `settle`."""
        with self._changed:
            held = self._holdings.setdefault(worker, _Holding())
            held.planned = tuple(sorted(self._to_be_had(worker)[:gpus], key=(self._gpus or ()).index))
            held.is_on_cpu, held.since = not gpus, self._clock()
            self._wants.pop(queue, None)

    def settle(self, worker: str) -> str | None:
        """A worker's engine has ended: free what its next model does not need.

        Returns CUDA_VISIBLE_DEVICES for that model; None leaves the environment's.
        """
        if self._gpus is None:
            return None
        with self._changed:
            held = self._holdings.setdefault(worker, _Holding())
            if held.planned is not None:
                held.gpus, held.planned = held.planned, None
            self._changed.notify_all()
            return ",".join(held.gpus)

    def give_back(self, worker: str) -> None:
        """A worker has no engine any more, and loads none."""
        with self._changed:
            self._holdings.pop(worker, None)
            self._changed.notify_all()

    def note_waiting(self, waiting: Mapping[str, int]) -> None:
        """Note the queues that nobody works anywhere, though jobs wait, as {queue: GPUs}."""
        now = self._noted_at = self._clock()
        with self._changed:
            found = {queue: _Want(queue, gpus, now) for queue, gpus in waiting.items() if gpus}
            self._wants = {queue: self._wants.get(queue, want) for queue, want in found.items()}

    def is_to_look(self) -> bool:
        """Whether it is long ago that the queues were noted, since all are at work."""
        return self._clock() - self._noted_at >= _LOOK_SECONDS

    def note_load(self, seconds: float) -> None:
        """Note how long a model took to load."""
        self._slowest_load = max(self._slowest_load, seconds)

    def is_asked(self, worker: str) -> bool:
        """Whether a worker is to give way once its jobs are done: another model has waited for its turn."""
        with self._changed:
            due = self._due()
            if due is None or self._gpus is None:
                return False
            missing = due.gpus - len(self._free())
            for name, held in sorted(self._holdings.items(), key=lambda item: item[1].since):
                if missing <= 0:
                    return False
                if name == worker:
                    return bool(held.occupied)
                missing -= len(held.occupied)
            return False

    def make_room(self, worker: str, drop: Callable[[], None]) -> bool:
        """For a worker that found nothing it could load: see that what waits for GPUs gets them.

        Whoever has an engine and no work ends it, `drop` being how the worker itself does. Returns False when nothing
        waits for GPUs, True when it is worth looking again; waits a moment where all are at work.
        """
        with self._changed:
            if not self._wants:
                return False
            is_held = bool(self._holdings.get(worker, _Holding()).occupied)
            others = [act for name, act in self._droppers.items() if name != worker and name in self._holdings]
        if is_held:
            drop()
        elif not any(act() for act in others):
            with self._changed:
                self._changed.wait(_MOMENT_SECONDS)
        return True

    def avoid(self, queue: str, seconds: float) -> None:
        """Leave a queue to other processes for a while: its model did not load here."""
        self._avoided[queue] = self._clock() + seconds

    def is_avoided(self, queue: str) -> bool:
        """Whether a queue is left to others now."""
        return self._clock() < self._avoided.get(queue, 0.0)

    def _due(self) -> _Want | None:
        """What has waited longest, when that is a turn or more."""
        turn = max(_TURN_SECONDS, _LOADS_A_TURN * self._slowest_load)
        first = min(self._wants.values(), key=lambda want: want.since, default=None)
        return first if first is not None and self._clock() - first.since >= turn else None

    def _free(self) -> list[str]:
        occupied = {gpu for held in self._holdings.values() for gpu in held.occupied}
        return [gpu for gpu in self._gpus or () if gpu not in occupied]

    def _to_be_had(self, worker: str) -> list[str]:
        """A worker's own first: with as many again it keeps them, and its engine need not move."""
        held = self._holdings.get(worker, _Holding())
        own = list(dict.fromkeys([*held.gpus, *(held.planned or ())]))
        return own + self._free()
