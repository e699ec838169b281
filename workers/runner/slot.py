"""A worker's slot for one engine: load it, feed it, collect results, end it, and track requests in flight."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from persyn.db.spending import Place
from persyn.jobs.expenses import Tariff
from persyn.jobs.queue import Claim
from persyn.llm import gpus
from persyn.llm.host import Host, Loaded
from persyn.llm.protocols import ModelSpec, Request, Result
from persyn.llm.rates import Usage
from persyn.settings import Settings
from persyn.workers.runner.poison_isolation import Key


@dataclass(slots=True, eq=False)
class OpenJob:
    """A job under lease, with its remaining requests and the number of missing results."""

    claim: Claim
    spec: ModelSpec
    waiting: deque[Request]
    left: int = field(init=False)
    tariff: Tariff = field(default_factory=lambda: Tariff(Place.ENGINE))
    #: Whether the model is reached differently since the job was claimed: it is released without further requests.
    is_turned: bool = False
    #: In a run with a budget: an upper estimate of each request that is in flight or may be sent, by the request's id.
    held: dict[int, Usage] = field(default_factory=dict)
    #: The number of changes of the claim's expenses.
    serial: int = 0

    def __post_init__(self) -> None:
        self.left = len(self.waiting)

    def next_serial(self) -> int:
        """Number another change of the claim's expenses."""
        self.serial += 1
        return self.serial

    def ready(self, room: int) -> int:
        """How many of the first `room` waiting requests may be sent, as far as a budget is concerned."""
        if not self.tariff.has_budget:
            return min(room, len(self.waiting))
        return sum(request.id in self.held for request in islice(self.waiting, room))

    @property
    def may_send(self) -> bool:
        """Whether the first waiting request may be sent."""
        return (
            not self.is_turned
            and bool(self.waiting)
            and (not self.tariff.has_budget or self.waiting[0].id in self.held)
        )


@dataclass(frozen=True, slots=True)
class Flight:
    """A request in flight."""

    job: OpenJob
    request: Request

    @property
    def key(self) -> Key:
        """Identifies the request across engines."""
        return self.job.claim.id, self.request.id


class Slot:
    """Holds at most one engine host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._devices: str | None = None
        self._host: Host | None = None
        self._flying: dict[int, Flight] = {}
        self._serial = itertools.count()
        self._began_at = self._result_at = 0.0

    @property
    def loaded(self) -> Loaded | None:
        """What the engine reported when its model was loaded; None before."""
        return self._host.loaded if self._host is not None else None

    @property
    def log(self) -> str:
        """The name of the engine's log file."""
        assert self._host is not None
        return self._host.log.name

    @property
    def gpus(self) -> str | None:
        """The names of the engine's GPUs; None for a model that needs none."""
        assert self._host is not None
        if not self._host.spec.gpus:
            return None
        devices = self._devices or os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return gpus.names([device for device in devices.split(",") if device])

    @property
    def in_hand(self) -> int:
        """The number of requests in flight."""
        return len(self._flying)

    def is_flying(self, job: OpenJob) -> bool:
        """Whether requests of a job are in flight."""
        return any(flight.job is job for flight in self._flying.values())

    @property
    def load_seconds(self) -> float:
        """Seconds since the engine's process was started."""
        return time.monotonic() - self._began_at

    @property
    def fruitless_seconds(self) -> float:
        """Seconds for which an engine with requests in flight has returned no result."""
        return time.monotonic() - self._result_at if self._flying else 0.0

    def holds(self, spec: ModelSpec) -> bool:
        """Whether the slot's engine serves this model."""
        return self._host is not None and self._host.spec == spec

    def start(self, spec: ModelSpec, devices: str | None) -> None:
        """Start loading a model; the slot must be empty.

        devices: CUDA_VISIBLE_DEVICES for it; None keeps the environment's, i.e. nothing else uses this machine.
        """
        assert self._host is None
        self._devices = devices
        self._began_at = time.monotonic()
        self._host = Host(
            spec,
            self._settings.home,
            load_seconds=self._settings.load_seconds,
            stall_seconds=self._settings.stall_seconds,
            devices=devices,
            is_alone=devices is None,
        )

    def submit(self, jobs: Iterable[OpenJob], room: int) -> None:
        """Submit up to `room` pending requests, job by job."""
        assert self._host is not None
        was_idle = not self._flying
        requests: list[Request] = []
        for job in jobs:
            while job.may_send and len(requests) < room:
                flight = Flight(job, job.waiting.popleft())
                serial = next(self._serial)  # request ids are only unique within a job
                self._flying[serial] = flight
                requests.append(msgspec.structs.replace(flight.request, id=serial))
        if requests:
            if was_idle:
                self._result_at = time.monotonic()  # the engine was idle until now
            self._host.submit(requests)

    def receive(self, timeout: float) -> list[tuple[Flight, Result]]:
        """Return finished requests; wait up to `timeout` seconds for the first. Raises what `Host.receive` does."""
        if self._host is None:
            return []
        return [(self._flying.pop(result.id), result) for result in self._host.receive(timeout)]

    def emptied(self) -> None:
        """Restart the timer for missing results, after the received ones were saved."""
        self._result_at = time.monotonic()

    def end(self) -> list[Flight]:
        """End the engine; its requests in flight go back to the front of their jobs and are returned."""
        flights = list(self._flying.values())
        for flight in reversed(flights):
            flight.job.waiting.appendleft(flight.request)
        self._flying = {}
        if self._host is not None:
            self._host.close()
            self._host = None
        return flights
