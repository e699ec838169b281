"""Account for one worker's requests: what may be sent, what results have cost, and the time of its engine."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import groupby, islice

from sqlalchemy.orm import Session

from persyn.db.spending import Place
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Admitted, Bill, Shortage
from persyn.llm import engines, rates
from persyn.llm.protocols import ModelSpec
from persyn.llm.rates import NOTHING, Costs
from persyn.stages.batch import Done
from persyn.workers.runner.slot import Flight, OpenJob
from persyn.workers.runner.transactions import Transactions

#: While a budget allows no request until others are settled: the interval between two questions to the store is drawn
#: from this range, so that workers take turns.
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.1, 0.3
#: How often the time of a busy engine is written, so that a lost worker's is known.
CHARGE_SECONDS = 15.0


class Purse:
    """The expenses of one worker's open jobs; their engine has one model at a time."""

    def __init__(self, transactions: Transactions, lease: timedelta) -> None:
        self._transactions = transactions
        self._lease = lease
        self._spec: ModelSpec | None = None
        self._weight = 0
        self._charged_at: float | None = None
        self._ask_at: dict[int, float] = {}

    def turn_to(self, spec: ModelSpec) -> None:
        """The worker works jobs of this model from now on; its engine may still have to be loaded."""
        if spec != self._spec:
            self._spec, self._costs = spec, Costs(spec)
            self._weight = 0 if engines.is_light(spec.engine, spec.options) else max(1, spec.gpus)
        if self._charged_at is None:
            self._charged_at = time.monotonic()

    def rest(self) -> None:
        """The worker has no open job any more."""
        self._charged_at = None
        self._ask_at.clear()

    def may_ask(self, job: OpenJob) -> bool:
        """Whether more requests of a job may be sent, as far as is known."""
        is_open = not job.is_turned and bool(job.waiting)
        return is_open and time.monotonic() >= self._ask_at.get(job.claim.id, 0.0)

    def look(self, job: OpenJob, room: int = 1) -> Admitted:
        """How many of a job's next requests, at most `room`, a budget allows now, and why there may be none at all."""
        most = [self._costs.most(request) for request in islice(job.waiting, room)]
        count, lacking = self._transactions.read(
            lambda session: expenses.admit(session, job.claim, job.tariff, most, is_look=True)
        )
        return count, None if count or lacking is None or lacking.is_passing else lacking

    def admit(self, job: OpenJob, room: int) -> Shortage | None:
        """Hold amounts for a job's next requests, at most `room`; returns why there may be no other ones at all."""
        is_batch = job.tariff.place is Place.BATCH
        upcoming = [
            request for request in islice(job.waiting, None if is_batch else room) if request.id not in job.held
        ]
        most = [self._costs.most(request) for request in upcoming]
        if not upcoming:
            return None

        serial = job.next_serial()

        def admit(session: Session) -> Admitted:
            is_held = self._hold(session, job)
            return expenses.admit(session, job.claim, job.tariff, most, serial=serial) if is_held else (0, None)

        count, lacking = self._transactions.write(admit)
        job.held |= {request.id: usage for request, usage in zip(upcoming[:count], most, strict=False)}
        if lacking is None:
            return None
        self._ask_at[job.claim.id] = time.monotonic() + random.uniform(_SHORTEST_SECONDS, _LONGEST_SECONDS)  # noqa: S311 - no secret
        return None if count or lacking.is_passing else lacking

    def bill(self, job: OpenJob, done: Sequence[Done]) -> Bill:
        """What some results of a job cost, and the time of the engine since the last bill."""
        usage = held_usage = NOTHING
        repeats = uncounted = held = 0
        for item in done:
            most = job.held.pop(item.request.id, None)
            if most is not None:
                held, held_usage = held + 1, held_usage.plus(most)
            again, known = getattr(item.result, "repeats", 0), rates.usage_of(item.result)
            if again or known is None:
                most = most or self._costs.most(item.request)
                usage, repeats = usage.plus(most, again), repeats + again
            if known is None and most is not None and most.tokens:
                known, uncounted = most, uncounted + 1
            usage = usage.plus(known or NOTHING)
        return Bill(len(done), repeats, uncounted, usage, held, held_usage, self._lap(), job.next_serial())

    def break_off(self, flights: Sequence[Flight], calls: int | None) -> None:
        """Count what requests in flight may cost that have ended without results; nothing is held for them any more.

        Those of a job that was taken away were counted then.
        calls: how many of the requests a server may have charged; None means all of them.
        """
        by_job = sorted(flights, key=lambda flight: flight.job.claim.id)
        of_jobs = groupby(by_job, key=lambda flight: flight.job)
        for job, mine in ((job, list(mine)) for job, mine in of_jobs if job.tariff.place is not Place.BATCH):
            usage, count = NOTHING, 0
            if job.tariff.place is Place.SERVER:
                count = len(mine) if calls is None else min(calls, len(mine))
                calls = None if calls is None else calls - count
                usage = expenses.total(self._costs.most(flight.request) for flight in mine[:count])
            held = list(job.held.values())
            job.held.clear()
            bill = Bill(0, count, 0, usage, len(held), expenses.total(held), self._lap(), job.next_serial())
            self._transactions.write(partial(self._settle, job=job, bill=bill))

    def charge_time(self, job: OpenJob, *, at_least: float = 0.0) -> None:
        """Count the time of the engine since the last bill to a job, unless it is shorter than so many seconds."""
        if self._charged_at is None or time.monotonic() - self._charged_at < at_least or not self._weight:
            return
        bill = Bill(engine_seconds=self._lap(), serial=job.next_serial())
        self._transactions.write(lambda session: expenses.settle(session, job.claim, job.tariff, bill))

    def _settle(self, session: Session, *, job: OpenJob, bill: Bill) -> None:
        settle = expenses.settle if self._hold(session, job) else expenses.settle_late
        settle(session, job.claim, job.tariff, bill)

    def _hold(self, session: Session, job: OpenJob) -> bool:
        return queue.hold(session, job.claim, lease=self._lease, is_progress=False)

    def _lap(self) -> float:
        """The seconds since the last call, times the engine's GPUs."""
        if self._charged_at is None:
            return 0.0
        at = time.monotonic()
        seconds, self._charged_at = at - self._charged_at, at
        return seconds * self._weight
