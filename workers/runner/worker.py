"""The worker: holds leases and one engine host, submits the jobs' requests to it, and saves the results.

No transaction is open while a model computes, the engine stays full across job boundaries, and
every result is saved as soon as it arrives: if the process dies for any reason, only requests in
flight are computed again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from persyn.analysis import spending
from persyn.db import bulk
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.work import Load
from persyn.errors import AccountError, EngineError, HostLacks, OutageError, PermanentError, shorten
from persyn.jobs import owner, queue, workload
from persyn.jobs.expenses import Shortage
from persyn.jobs.queue import Claim
from persyn.llm import engines
from persyn.llm.host import HostDied
from persyn.llm.protocols import Failed, Fitted, ModelSpec, Request, Result
from persyn.runs import pipeline
from persyn.settings import Settings
from persyn.stages import fit_router
from persyn.stages.batch import Done
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.claims import Claims
from persyn.workers.runner.heartbeat import Leases
from persyn.workers.runner.held_jobs import HeldJobs
from persyn.workers.runner.ledger import Ledger
from persyn.workers.runner.listener import Listener
from persyn.workers.runner.permits import Permits
from persyn.workers.runner.poison_isolation import PoisonIsolation
from persyn.workers.runner.purse import CHARGE_SECONDS, Purse
from persyn.workers.runner.slot import Flight, OpenJob, Slot
from persyn.workers.runner.telemetry import Telemetry
from persyn.workers.runner.transactions import Transactions

if TYPE_CHECKING:
    from persyn.workers.runner.batch_slot import BatchSlot

log = logging.getLogger(__name__)

#: How long to wait for results, and how long a worker without a job waits.
_RECEIVE_SECONDS = 0.5
_IDLE_SECONDS = 0.5
#: Many workers of a process look for jobs as often as this many do together.
_MOST_LOOKING = 4
#: How long to leave a queue to others after its model did not load here.
_AVOID_SECONDS = 600.0
#: How long a worker that was told to stop waits for an unavailable database.
_STOP_SECONDS = 10.0
#: How long to wait for the next result of requests in flight when their model is reached differently from now on; a
#: server that has failed may never answer them.
_TURN_SECONDS = 60.0
#: After this many in a row, the engine or the machine is to blame rather than a request.
_MOST_FUTILE = 2


class Worker:
    """Works jobs until none are left, or `stop` is set.

    run_id: only this run's jobs; None means any.
    reach:  the process's GPUs, and the queues it takes.
    ledger: state shared with other workers of the process; None if it is the only one.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        run_id: int | None = None,
        reach: Reach = Reach(),  # noqa: B008  frozen
        listener: Listener | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        #: Held while there is work; its holder may end the engine.
        self._busy = threading.Lock()
        self._ledger = ledger or Ledger(reach.gpus)
        self.owner = self._ledger.enlist(self._drop_when_idle)
        self.stop = threading.Event()
        self._database = database
        self._settings = settings
        self._run_id = run_id
        self._listener = listener or Listener()
        lease = timedelta(seconds=settings.lease_seconds)
        self._leases = Leases(database, lease)
        self._claims = Claims(self.owner, reach, self._ledger, run_id=run_id, lease=lease)
        self._transactions = Transactions(database, alive=self._leases.alive, pause=self._pause)
        self._telemetry = Telemetry(self.owner)
        self._suspicion = PoisonIsolation()
        self._jobs = HeldJobs(self.owner, self._transactions, self._leases, self._telemetry, self._suspicion)
        self._slot: Slot | BatchSlot = Slot(settings)
        self._permits = Permits(self._transactions)
        self._purse = Purse(self._transactions, lease)
        self._queue: str | None = None
        self._is_loading = False
        #: Requests found to kill the engine, and deaths without any in flight, since the last good result.
        self._futile = 0

    def __enter__(self) -> Worker:
        self._leases.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._busy:
                self._leave()
        finally:
            self._leases.__exit__(kind, error, at)

    def end(self) -> None:
        """Stop, even if the database does not answer: leases of jobs that cannot be released within seconds expire."""
        self.stop.set()
        self._database.hurry(_STOP_SECONDS)

    def run(self) -> None:
        """Work until the run is over or, without a run, until no job is left."""
        with self:
            while not self.stop.is_set() and not self._transactions.write(self._is_over):
                if not self.work():
                    self.stop.wait(_IDLE_SECONDS * max(1.0, self._ledger.n_workers / _MOST_LOOKING))

    @property
    def queue(self) -> str | None:
        """The queue of the current or previous jobs; None without an engine."""
        return self._queue

    def work(self) -> bool:
        """Work one queue after another until none has a job for this worker; False if there was none at all.

        The model stays loaded until its GPUs are needed; leaving the worker's context gives open jobs back and ends it.
        """
        found = False
        with self._busy:
            while not self.stop.is_set():
                claim = self._transactions.write(self._choose)
                if claim is not None:
                    found = True
                    self._turn_to(claim)
                elif not self._ledger.make_room(self.owner, self._drop):
                    break
        return found

    def _turn_to(self, claim: Claim) -> None:
        if claim.queue != self._queue:
            self._queue, self._futile = claim.queue, 0  # a new engine is not blamed for the previous one's deaths
        self._open(claim)
        self._drain()

    def _is_over(self, session: Session) -> bool:
        pipeline.sweep(session, actor=self.owner, dead_owners=owner.dead(workload.owners(session)))
        if self._run_id is None:
            return workload.is_drained(session)
        return session.get_one(Run, self._run_id).state is not RunState.RUNNING

    def _choose(self, session: Session) -> Claim | None:
        return self._claims.first(session, self._queue, self._jobs.ids)

    def _drop(self) -> None:
        """End the engine and release its GPUs."""
        self._slot.end()
        self._queue = None
        self._ledger.give_back(self.owner)

    def _drop_when_idle(self) -> bool:
        """End the engine unless there is work; return whether it was ended."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            self._drop()
        finally:
            self._busy.release()
        return True

    def _drain(self) -> None:
        """Work the open jobs, then the rest of their queue."""
        spec: ModelSpec | None = None
        while not self.stop.is_set():
            self._leases.alive()
            self._open_jobs()
            self._turn()
            if (job := self._jobs.first) is None:
                break
            spec = job.spec
            self._feed(spec)
            self._collect()
            self._charge_time(at_least=CHARGE_SECONDS)
            self._jobs.drop_lost()
            self._end_fruitless()
        self._purse.rest()
        if spec is not None:
            self._listener.idle(spec)

    def _open_jobs(self) -> None:
        """Claim jobs up to this worker's share, so that its engine does not idle between jobs."""
        while not self._claims.is_enough(self._jobs.n_left, self._window()) and not self.stop.is_set():
            claim = self._transactions.write(self._claim_next)
            if claim is None:
                return
            self._open(claim)

    def _claim_next(self, session: Session) -> Claim | None:
        assert self._queue is not None
        return self._claims.next(session, self._queue, self._jobs.n_left, self._window())

    def _open(self, claim: Claim) -> None:
        job = self._jobs.open(claim)
        if job is None:
            return
        self._purse.turn_to(job.spec)
        if not job.left:
            self._save(job, [])
        elif job.tariff.has_budget:
            self._halt_if(job, self._purse.look(job)[1])

    def _halt_if(self, job: OpenJob, lacking: Shortage | None) -> None:
        """Halt a job whose budget is used up, with the waiting jobs of its model."""
        if lacking is not None and not self._slot.is_flying(job):
            self._jobs.end(job.claim, pipeline.halt, str(lacking), how="its budget is used up")

    def _turn(self) -> None:
        """Release jobs that are to be handed back, each once its requests in flight have finished."""
        turned = self._jobs.take_turned()
        is_stuck = turned and len(turned) == len(self._jobs) and self._slot.fruitless_seconds >= _TURN_SECONDS
        if is_stuck and self._jobs.are_moved(turned):
            self._slot.end()
        for job in turned:
            if not self._slot.is_flying(job):
                self._jobs.release(job.claim)

    def _feed(self, spec: ModelSpec) -> None:
        self._permits.turn_to(spec)
        if not self._slot.holds(spec):
            self._slot.end()
            self._slot = self._slot_for(spec)
            devices = self._ledger.settle(self.owner)
            try:
                self._slot.start(spec, devices)
            except OSError as error:  # a full disk, or no memory for another process
                self._fail_jobs(f"the engine cannot be started: {error}", did_load=False)
                return
            self._is_loading = True
            self._listener.loading(spec)
        # Without renewed leases, submit no new requests: others may hold the jobs.
        if self._slot.loaded is not None and self._leases.are_kept:
            room = max(0, self._window() - self._slot.in_hand)
            open_jobs = [job for job in self._jobs if self._purse.may_ask(job)]
            room = self._permits.take(self._affordable(open_jobs, room), room)
            self._admit(open_jobs, room)
            self._slot.submit(self._jobs, room)

    def _affordable(self, jobs: Sequence[OpenJob], room: int) -> Iterator[Request]:
        """The next requests of jobs, at most `room`, that budgets allow: permits to send others would be lost."""
        for job in jobs:
            count = min(room, len(job.waiting))
            if job.tariff.has_budget and count:
                count, lacking = self._purse.look(job, count)
                self._halt_if(job, lacking)
            yield from islice(job.waiting, count)
            room -= count

    def _admit(self, jobs: Sequence[OpenJob], room: int) -> None:
        """Hold amounts of their runs' budgets for the next requests of jobs, at most `room`."""
        for job in filter(self._jobs.is_open, jobs):
            if room > 0 and job.tariff.has_budget:
                self._halt_if(job, self._purse.admit(job, room))
            room -= job.ready(max(room, 0))

    def _charge_time(self, *, at_least: float = 0.0) -> None:
        """Count the time of the engine to one of the jobs that it works."""
        if self._jobs.first is not None:
            self._purse.charge_time(self._jobs.first, at_least=at_least)

    def _break_off(self, calls: int | None) -> list[Flight]:
        """End the engine; count what its requests in flight may cost, see `Purse.break_off`, and return them."""
        flights = self._slot.end()
        self._purse.break_off(flights, calls)
        return flights

    def _slot_for(self, spec: ModelSpec) -> Slot | BatchSlot:
        """An empty slot of the kind that the model needs."""
        if engines.batch_size(spec):
            # Importing aiohttp would add half a second to every command.
            from persyn.workers.runner.batch_slot import BatchSlot

            return BatchSlot(self._transactions, lease=self._leases.lease)
        return Slot(self._settings)

    def _collect(self) -> None:
        try:
            results = self._slot.receive(_RECEIVE_SECONDS)
        except HostDied as death:
            self._bury(str(death))
            return
        except (OutageError, AccountError) as error:
            self._break_off(error.may_be_charged)
            self._leave_server(error)
            return
        except EngineError as error:
            was_loaded = self._slot.loaded is not None
            self._break_off(error.may_be_charged)
            self._fail_jobs(str(error), did_load=was_loaded, is_final=self._is_final(error))
            return
        self._greet()
        if results:
            self._land(results)

    def _greet(self) -> None:
        """Report the loaded model once to the listener, the log and the store."""
        loaded, job = self._slot.loaded, self._jobs.first
        if loaded is None or not self._is_loading or job is None:
            return  # a budget may have halted all jobs
        self._is_loading, seconds = False, self._slot.load_seconds
        self._ledger.note_load(seconds)
        self._listener.loaded(job.spec, seconds)
        if job.spec.model and self._slot.log:  # an answer checker has a process, but no model; a batch has neither
            log.info("loaded", extra=self._telemetry.about(job.claim, engine=loaded.version, seconds=seconds))
            row = {"run_id": job.claim.run_id, "job_id": job.claim.id, "owner": self.owner, "engine": loaded.version}
            row |= {"seconds": seconds, "log": self._slot.log, "gpus": self._slot.gpus}
            self._transactions.write(lambda session: bulk.insert_new(session, Load, [row]))

    def _land(self, results: Sequence[tuple[Flight, Result]]) -> None:
        """Save results, job by job."""
        assert self._slot.loaded is not None
        engine = self._slot.loaded.version
        by_job: dict[OpenJob, list[Done]] = defaultdict(list)
        for flight, result in results:
            self._suspicion.finished(flight.key)
            self._permits.landed(flight.request, result)
            if not isinstance(result, Failed):
                self._futile = 0
            if self._jobs.is_open(flight.job):
                by_job[flight.job].append(Done(flight.request, result, engine))
        for job, done in by_job.items():
            self._save(job, done)
        self._slot.emptied()
        for _, result in results:
            if isinstance(result, Fitted):
                self._tidy(result)

    def _tidy(self, fitted: Fitted) -> None:
        """Remove the checkpoint of a fit whose job had been lost to another worker."""
        if not self._transactions.read(lambda session: fit_router.is_used(session, fitted)):
            shutil.rmtree(self._settings.home / fitted.folder, ignore_errors=True)

    def _save(self, job: OpenJob, done: Sequence[Done]) -> None:
        done = self._jobs.worth_saving(job, done)
        job.left -= len(done)
        if not self._jobs.save(job, done, self._purse.bill(job, done)):
            return
        if not job.left:  # the run may have reached another stage: lengths are known now, or teachers
            self._transactions.outlast(lambda: spending.record(self._database, job.claim.run_id))
        failed = sum(isinstance(item.result, Failed) for item in done)
        self._listener.saved(job.claim.stage, len(done) - failed, failed)

    def _bury(self, reason: str) -> None:
        """An engine died: requeue its requests for a new one, except for one that was found to kill it.

        If several requests in a row seem to kill it, the engine itself is to blame and its jobs have a failed attempt.
        """
        was_loaded = self._slot.loaded is not None
        flying = self._break_off(None)
        if not was_loaded:
            self._fail_jobs(f"the model did not load: {reason}", did_load=False)
            return
        log.warning("an engine died: %s", reason, extra={"worker": self.owner, "in_flight": len(flying)})
        guilty = self._suspicion.died([flight.key for flight in flying])
        self._futile += guilty is not None or not flying
        if self._futile >= _MOST_FUTILE:
            self._futile = 0
            self._fail_jobs(f"the engine loads, but every request kills it: {reason}", did_load=False)
            return
        for flight in flying:
            if flight.key == guilty and self._jobs.is_open(flight.job):
                flight.job.waiting.remove(flight.request)
                failure = Failed(flight.request.id, f"killed_engine: {reason}")
                self._suspicion.finished(flight.key)
                self._save(flight.job, [Done(flight.request, failure, flight.job.spec.engine)])

    def _is_final(self, error: EngineError) -> bool:
        """Whether a retry on any worker would fail, too; what this host lacks, another one may have."""
        is_alone = self._run_id is not None
        return isinstance(error, PermanentError) and (is_alone or not isinstance(error, HostLacks))

    def _fail_jobs(self, reason: str, *, did_load: bool, is_final: bool = False) -> None:
        if not did_load and self._queue is not None:
            # Another worker may have the memory or the files; a single worker can only wait a moment and retry.
            seconds = _AVOID_SECONDS if self._run_id is None else queue.BACKOFF.total_seconds()
            self._ledger.avoid(self._queue, seconds)
        self._charge_time()
        for job in self._jobs:
            self._jobs.fail(job.claim, reason, did_load=did_load, is_final=is_final)

    def _leave_server(self, error: EngineError) -> None:
        """Give back jobs whose server is unavailable, until its next retry; jobs that the server rejects fail."""
        is_outage = isinstance(error, OutageError)
        how = "its server is unavailable" if is_outage else "its server rejects all requests"
        for job in self._jobs:
            self._jobs.end(job.claim, pipeline.wait_out if is_outage else pipeline.give_up, str(error), how=how)
        if is_outage:
            self._listener.waiting(str(error))

    def _end_fruitless(self) -> None:
        """End an engine that is alive but has returned no result within the limit; its jobs have a failed attempt."""
        limit = self._settings.result_seconds
        if limit is None or self._slot.fruitless_seconds < limit:
            return
        self._slot.end()
        self._fail_jobs(f"the engine returned no result for {limit:.0f} s", did_load=True)

    def _leave(self) -> None:
        """Save what has arrived, give unfinished jobs back, end the engine."""
        try:
            with contextlib.suppress(HostDied, EngineError):
                if results := self._slot.receive(0):
                    self._land(results)
            self._drop()
            for job in self._jobs:
                self._jobs.release(job.claim)
        except OperationalError as error:
            log.warning("stopped without the database; leases will expire", extra={"error": shorten(str(error.orig))})
        finally:
            self._drop()

    def _window(self) -> int:
        loaded = self._slot.loaded
        return self._suspicion.limit(loaded.window) if loaded is not None else 1

    def _pause(self, seconds: float) -> None:
        """Sleep; shorter if the worker was told to stop."""
        if self.stop.wait(seconds):
            time.sleep(min(seconds, _IDLE_SECONDS))
