"""Share GPUs and the CPU among the workers of one process: allocation, turns, and models that do not load here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from persyn.jobs import owner

#: A model may keep its GPUs from a waiting one for this many times the load time, so that loading takes only a
#: small share of the time.
_LOADS_A_TURN = 20
#: The minimum length of such a turn.
_TURN_SECONDS = 10.0
#: Maximum wait for GPUs before the store is read again.
_MOMENT_SECONDS = 2.0
#: How often busy workers check which other queues are waiting.
_LOOK_SECONDS = 5.0


@dataclass(slots=True)
class _Holding:
    """What one worker has.

    queue: its engine's, running or not.
    gpus: those of its engine, running or not.
    planned: those of the model to load once that engine has ended; None if there is none.
    has_cpu: whether its model is the one that computes on the CPU.
    is_light: whether its model needs neither.
    since: when they were allocated.
    """

    queue: str = ""
    gpus: tuple[str, ...] = ()
    planned: tuple[str, ...] | None = None
    has_cpu: bool = False
    is_light: bool = False
    since: float = 0.0

    @property
    def occupied(self) -> set[str]:
        return {*self.gpus, *(self.planned or ())}


@dataclass(frozen=True, slots=True)
class _Want:
    """A queue that nobody works, and the number of GPUs its model needs."""

    queue: str
    gpus: int
    since: float


class Ledger:
    """Allocates GPUs to each worker's model, and the CPU to one model at a time; a light model needs neither.

    A model that finds too few free GPUs waits. After it has waited for a turn, GPUs that become free are reserved for
    it, and the workers with the longest current turns are asked to release theirs. This applies to a large model
    next to small ones and vice versa.

    gpus:  the ids; None means those of the environment: one model at a time has all of them, and the CPU.
    clock: in seconds; replaced in tests.
    """

    def __init__(self, gpus: Collection[str] | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._gpus = None if gpus is None else tuple(gpus)
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._holdings: dict[str, _Holding] = {}
        self._wants: dict[str, _Want] = {}
        #: Queues whose models wait for the CPU.
        self._cpu_wanted: set[str] = set()
        self._avoided: dict[str, float] = {}
        self._droppers: dict[str, Callable[[], bool]] = {}
        self._slowest_load = 0.0
        self._noted_at = 0.0

    def enlist(self, drop: Callable[[], bool]) -> str:
        """Register a worker; returns its name as an owner of leases.

        drop: ends its engine and releases its GPUs unless it has work; returns whether it did.
        """
        with self._changed:
            name = owner.name(len(self._droppers) or None)
            self._droppers[name] = drop
            return name

    def has_room(self, worker: str, queue: str, gpus: int, *, is_light: bool = False) -> bool:
        """Whether a worker could have what a queue's model needs, now or after its own engine has ended.

        A light model is loaded by one worker of the process: a second would double the requests to its server. A worker
        whose engine is light leaves other models to workers without an engine, and vice versa: loaded models stay.
        """
        with self._changed:
            own = self._holdings.get(worker)
            if own is not None and own.is_light is not is_light and len(self._holdings) < len(self._droppers):
                return False
            others = [held for name, held in self._holdings.items() if name != worker]
            if is_light:
                return not any(held.queue == queue for held in others)
            if self._needs_cpu(gpus):
                return not any(held.has_cpu for held in others)
            due = self._due()
            kept = due.gpus if due is not None and due.queue != queue else 0
            return len(self._to_be_had(worker)) - kept >= gpus

    def take(self, worker: str, queue: str, gpus: int, *, is_light: bool = False) -> None:
        """Allocate what `has_room` confirmed; the current engine keeps its GPUs until `settle`."""
        with self._changed:
            held = self._holdings.setdefault(worker, _Holding())
            held.planned = tuple(sorted(self._to_be_had(worker)[:gpus], key=(self._gpus or ()).index))
            held.queue, held.is_light, held.since = queue, is_light, self._clock()
            held.has_cpu = not is_light and self._needs_cpu(gpus)
            self._wants.pop(queue, None)
            self._cpu_wanted.discard(queue)

    def settle(self, worker: str) -> str | None:
        """A worker's engine has ended: release the GPUs its next model does not need.

        Returns CUDA_VISIBLE_DEVICES for that model; None means the environment's.
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
        """A worker has no engine any more and loads none."""
        with self._changed:
            self._holdings.pop(worker, None)
            self._changed.notify_all()

    def note_waiting(self, waiting: Mapping[str, int]) -> None:
        """Record the queues with waiting jobs that no worker anywhere serves, as {queue: GPUs}, without light ones."""
        now = self._noted_at = self._clock()
        with self._changed:
            self._cpu_wanted = {queue for queue, gpus in waiting.items() if self._needs_cpu(gpus)}
            found = {queue: _Want(queue, gpus, now) for queue, gpus in waiting.items() if queue not in self._cpu_wanted}
            self._wants = {queue: self._wants.get(queue, want) for queue, want in found.items()}

    def is_to_look(self) -> bool:
        """Whether the queues were last recorded too long ago, because all workers are busy."""
        return self._clock() - self._noted_at >= _LOOK_SECONDS

    @property
    def n_workers(self) -> int:
        """The number of workers of the process."""
        return len(self._droppers)

    def note_load(self, seconds: float) -> None:
        """Record how long a model took to load."""
        self._slowest_load = max(self._slowest_load, seconds)

    def is_asked(self, worker: str) -> bool:
        """Whether a worker should release its GPUs after its current jobs: another model has waited for a turn."""
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
        """Free GPUs or the CPU for waiting models, for a worker that found nothing it could load.

        If the worker has GPUs, `drop` ends its engine; otherwise idle other workers end theirs. Returns False when
        nothing waits, True when it is worth trying again; waits a moment if all others are busy with GPUs.
        """
        with self._changed:
            # A model that waits for the CPU and is loaded is worked by the worker that has it.
            on_cpu = [name for name, held in self._holdings.items() if held.has_cpu and name != worker]
            has_cpu_to_free = self._cpu_wanted and not any(
                self._holdings[name].queue in self._cpu_wanted for name in on_cpu
            )
            droppers = [self._droppers[name] for name in on_cpu] if has_cpu_to_free else []
        if any(drop_idle() for drop_idle in droppers):
            return True
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
        """Leave a queue to other processes for a while, because its model did not load here."""
        self._avoided[queue] = self._clock() + seconds

    def is_avoided(self, queue: str) -> bool:
        """Whether a queue is currently left to others."""
        return self._clock() < self._avoided.get(queue, 0.0)

    def _needs_cpu(self, gpus: int) -> bool:
        """Whether a model that is not light is alone on the CPU, or on the environment's GPUs."""
        return self._gpus is None or not gpus

    def _due(self) -> _Want | None:
        """The longest-waiting queue, if it has waited for at least a turn."""
        turn = max(_TURN_SECONDS, _LOADS_A_TURN * self._slowest_load)
        first = min(self._wants.values(), key=lambda want: want.since, default=None)
        return first if first is not None and self._clock() - first.since >= turn else None

    def _free(self) -> list[str]:
        occupied = {gpu for held in self._holdings.values() for gpu in held.occupied}
        return [gpu for gpu in self._gpus or () if gpu not in occupied]

    def _to_be_had(self, worker: str) -> list[str]:
        """The free GPUs, the worker's own first: if it needs equally many, it keeps its engine's place."""
        held = self._holdings.get(worker, _Holding())
        own = list(dict.fromkeys([*held.gpus, *(held.planned or ())]))
        return own + self._free()
