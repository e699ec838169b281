"""The jobs that a worker holds: each is opened, its results are saved, and it ends in one of several ways."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from persyn.db.work import JobState
from persyn.errors import PersynError, shorten
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Bill
from persyn.jobs.queue import Claim
from persyn.llm.protocols import Failed
from persyn.runs import pipeline
from persyn.stages.batch import Done
from persyn.stages.registry import STAGES
from persyn.workers.runner.heartbeat import Leases
from persyn.workers.runner.poison_isolation import PoisonIsolation
from persyn.workers.runner.slot import OpenJob
from persyn.workers.runner.telemetry import Telemetry
from persyn.workers.runner.transactions import Transactions

log = logging.getLogger(__name__)


class End(Protocol):
    """A transition of `pipeline` that ends a claim without its results."""

    def __call__(self, session: Session, job: Claim, error: str, /, *, owner: str) -> object:
        """End the claim."""


class HeldJobs:
    """One worker's open jobs; iterating over them gives those that are open now.

    A job leaves memory, and its lease is no longer renewed, before the transaction that ends it: if that one fails, the
    lease expires, and whoever claims the job next computes what is missing.

    owner: the worker's name.
    """

    def __init__(
        self,
        owner: str,
        transactions: Transactions,
        leases: Leases,
        telemetry: Telemetry,
        suspicion: PoisonIsolation,
    ) -> None:
        self._owner = owner
        self._transactions = transactions
        self._leases = leases
        self._telemetry = telemetry
        self._suspicion = suspicion
        self._jobs: dict[int, OpenJob] = {}

    def __iter__(self) -> Iterator[OpenJob]:
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def ids(self) -> set[int]:
        """The ids of the open jobs."""
        return set(self._jobs)

    @property
    def first(self) -> OpenJob | None:
        """The job that has been open for longest."""
        return next(iter(self._jobs.values()), None)

    @property
    def n_left(self) -> int:
        """The number of results that are missing."""
        return sum(job.left for job in self._jobs.values())

    def is_open(self, job: OpenJob) -> bool:
        """Whether a job is still held by this claim; it may have been let go and claimed again."""
        return self._jobs.get(job.claim.id) is job

    def open(self, claim: Claim) -> OpenJob | None:
        """Load a claimed job's requests; if that fails, the job has a failed attempt.

        None if it is not open: it has failed, or its model is reached differently since it was claimed.
        """
        self._leases.add(claim)
        self._telemetry.claimed(claim)
        try:
            job = self._transactions.read(lambda session: _load(session, claim))
        except OperationalError:
            raise
        except Exception as error:
            log.exception("a job cannot be loaded", extra=self._telemetry.about(claim))
            self.fail(claim, _reason(error))
            return None
        if job is None:
            self.release(claim)
            return None
        self._jobs[claim.id] = job
        return job

    def take_turned(self) -> list[OpenJob]:
        """The jobs that are to be handed back, since their model is reached differently or their run is paused."""
        for job_id in self._leases.turned() & self._jobs.keys():
            self._jobs[job_id].is_turned = True
        return [job for job in self if job.is_turned]

    def are_moved(self, jobs: Sequence[OpenJob]) -> bool:
        """Whether one of these jobs is in another queue by now."""
        claims = [job.claim for job in jobs]
        return bool(self._transactions.read(lambda session: queue.turned(session, claims, is_moved=True)))

    def drop_lost(self) -> None:
        """Let go of jobs that were cancelled or lost; their requests in flight are discarded."""
        for job_id in self._leases.lost() & self._jobs.keys():
            self._let_go(self._jobs[job_id])

    def worth_saving(self, job: OpenJob, done: Sequence[Done]) -> Sequence[Done]:
        """Without failures, if the job is to be handed back: perhaps they failed for the same reason."""
        if any(isinstance(item.result, Failed) for item in done) and self._is_turned(job):
            return [item for item in done if not isinstance(item.result, Failed)]
        return done

    def save(self, job: OpenJob, done: Sequence[Done], bill: Bill) -> bool:
        """Save results of a job with their bill; with the last, the job ends. False if they could not be saved."""
        try:
            is_held = self._transactions.write(lambda session: self._write(session, job, done, bill))
        except OperationalError:
            raise
        except PersynError as error:
            self.fail(job.claim, str(error), is_final=True)
            return False
        except Exception as error:
            # Rejected results must only fail their own job, not end the worker and then the next one.
            log.exception("results cannot be saved", extra=self._telemetry.about(job.claim))
            self.fail(job.claim, _reason(error))
            return False
        if not is_held:
            self._let_go(job)
            return False
        self._leases.renewed()
        if not job.left:
            self._forget(job.claim, "done")
        return True

    def release(self, claim: Claim) -> None:
        """Give a job back, without an attempt."""
        self._forget(claim, "released")
        self._transactions.write(lambda session: queue.release(session, claim, owner=self._owner))

    def fail(self, claim: Claim, reason: str, *, is_final: bool = False, did_load: bool = True) -> None:
        """End a claim with a failed attempt.

        is_final: whether it would fail again.
        did_load: whether its model did; if not, the last attempt's failure is that of all waiting jobs of its queue.
        """
        self._forget(claim, "an attempt failed", reason)

        def write(session: Session) -> None:
            if queue.release_turned(session, claim, owner=self._owner):
                return
            state = queue.fail(session, claim, reason, owner=self._owner, is_final=is_final)
            if state is JobState.FAILED:
                if not did_load:
                    queue.fail_waiting(session, claim, reason, owner=self._owner)
                pipeline.advance(session, claim.run_id, actor=self._owner)

        self._transactions.write(write)

    def end(self, claim: Claim, end: End, why: str, *, how: str) -> None:
        """End a claim by a transition of the pipeline. how: in few words, for the log."""
        self._forget(claim, how, why)
        self._transactions.write(lambda session: end(session, claim, why, owner=self._owner))

    def _write(self, session: Session, job: OpenJob, done: Sequence[Done], bill: Bill) -> bool:
        """Save some results of a job and, with the last, complete it and advance the run; False on a lost lease."""
        claim = job.claim
        is_progress = any(not isinstance(item.result, Failed) for item in done)
        if not queue.hold(session, claim, lease=self._leases.lease, is_progress=is_progress):
            expenses.settle_late(session, claim, job.tariff, bill)
            return False
        STAGES[claim.stage].save(session, claim, done)
        expenses.settle(session, claim, job.tariff, bill)
        # A budget that the run was given meanwhile holds for the next requests.
        job.tariff = replace(job.tariff, has_budget=expenses.has_budget(session, claim.run_id))
        if done:
            pipeline.answered(session, claim)
        if not job.left:
            pipeline.complete(session, claim, owner=self._owner)
        return True

    def _is_turned(self, job: OpenJob) -> bool:
        if not job.is_turned:
            job.is_turned = bool(self._transactions.read(lambda session: queue.turned(session, [job.claim])))
        return job.is_turned

    def _let_go(self, job: OpenJob) -> None:
        """Stop a job whose results may no longer be saved; a cancelled one ends here."""
        self._forget(job.claim, "lost or cancelled")

        def write(session: Session) -> None:
            if queue.stop_cancelled(session, job.claim, owner=self._owner):
                pipeline.advance(session, job.claim.run_id, actor=self._owner)

        self._transactions.write(write)

    def _forget(self, claim: Claim, how: str, reason: str = "") -> None:
        self._leases.remove(claim)
        self._jobs.pop(claim.id, None)
        self._suspicion.forget(claim.id)
        self._telemetry.ended(claim, how, reason)


def _load(session: Session, claim: Claim) -> OpenJob | None:
    """A job with its requests; None if its model is reached differently since it was claimed."""
    batch = STAGES[claim.stage].load(session, claim)
    if queue.turned(session, [claim]):
        return None
    return OpenJob(claim, batch.spec, deque(batch.requests), expenses.tariff(session, claim, batch.spec))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(getattr(error, 'orig', None) or error))}"
