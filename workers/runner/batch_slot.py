"""A worker's slot for a model behind a batch protocol: send each job as a batch, and collect its results hours later.

Takes the place of an engine host. The provider executes a batch whether or not anyone waits, so it is recorded in the
store: its key before it is created, and its id afterwards. A worker that takes over a job finds the batch by its id or,
if the id was not recorded any more, by its key in the provider's list.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from msgspec.structs import replace
from sqlalchemy.orm import Session

from persyn.config import fingerprint_of
from persyn.db import batches
from persyn.errors import AccountError, EngineError, OutageError
from persyn.jobs import queue
from persyn.llm import options
from persyn.llm.host import Loaded
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result
from persyn.llm.teachers import batch_api
from persyn.llm.teachers.batch_api import Again, Batch, BatchClient, BatchGone
from persyn.workers.runner.slot import Flight, OpenJob
from persyn.workers.runner.transactions import Transactions

T = TypeVar("T")

#: More than any worker holds: it claims all jobs of the queue.
_WINDOW = 2**31
#: How long a provider may take to list a batch whose creation was interrupted.
_SETTLE_SECONDS = 5.0
#: Results per `receive`.
_AT_ONCE = 256
#: How often a request without a result is sent again.
_MOST_AGAIN = 3


class JobLost(Exception):
    """The job's lease was lost; nothing may be sent for it."""


@dataclass(slots=True, eq=False)
class _Sent:
    """A job's batch at the provider.

    flights: by the requests' ids in the batch.
    ready:   results that were collected and not yet returned; None while the batch is not over.
    """

    job: OpenJob
    key: str
    batch_id: str
    flights: dict[str, Flight]
    look_at: float = 0.0
    finished: int = 0
    ready: deque[tuple[str, Result]] | None = None


class BatchSlot:
    """Sends and collects the batches of one model's jobs.

    lease: of a job, renewed with each record of its batch.
    """

    def __init__(self, transactions: Transactions, *, lease: timedelta) -> None:
        self.loaded: Loaded | None = None
        self.log = ""
        self.gpus: str | None = None
        self.load_seconds = self.fruitless_seconds = 0.0
        self._transactions = transactions
        self._lease = lease
        #: Of the provider, and of the account there.
        self._place = ""
        #: Raised by the next `receive`, like the errors of an engine host.
        self._error: EngineError | None = None
        self._spec: ModelSpec | None = None
        self._client: BatchClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sent: dict[int, _Sent] = {}
        self._asked_again: defaultdict[tuple[int, str], int] = defaultdict(int)
        #: Of the requests that were sent again: answers that were unusable and may be charged.
        self._repeats: Counter[tuple[int, str]] = Counter()
        self._poll_seconds = 0.0

    @property
    def in_hand(self) -> int:
        """The number of requests that were sent and whose results were not returned."""
        return sum(len(sent.flights) for sent in self._sent.values())

    def holds(self, spec: ModelSpec) -> bool:
        """Whether the slot serves this model."""
        return self._spec == spec

    def is_flying(self, job: OpenJob) -> bool:
        """Never: a job can be released at any time, and its batch is found again."""
        return False

    def start(self, spec: ModelSpec, devices: str | None) -> None:
        """Prepare to call the provider; nothing is sent."""
        assert self._spec is None
        self._spec, self._loop = spec, asyncio.new_event_loop()
        try:
            chosen = options.decode(spec, options.OpenAIOptions)
            self._client = BatchClient(spec.model, chosen)
        except EngineError as error:
            self._error = error
            return
        self._poll_seconds = chosen.poll_seconds
        self._place = fingerprint_of([str(self._client.url), chosen.api_key_env])
        self.loaded = Loaded(self._client.version, _WINDOW)

    def submit(self, jobs: Iterable[OpenJob], room: int) -> None:
        """Send each job's waiting requests as a batch, or find the batch that was sent with them before."""
        jobs = list(jobs)
        self._sent = {job_id: sent for job_id, sent in self._sent.items() if sent.job in jobs}
        for job in jobs:
            if job.may_send and job.claim.id not in self._sent:
                try:
                    self._send(job)
                except JobLost:
                    continue  # its heartbeat tells the worker
                except EngineError as error:
                    self._error = error
                    return

    def receive(self, timeout: float) -> list[tuple[Flight, Result]]:
        """Return results of batches that are over; wait up to `timeout` seconds where there are none.

        Raises `EngineError` for invalid options or a missing key, and `OutageError` or `AccountError` when the provider
        cannot be asked, or rejects a batch.
        """
        if self._error is not None:
            raise self._error
        for sent in list(self._sent.values()):
            if sent.ready is None and sent.look_at <= time.monotonic():
                self._try_to_look(sent)
        found: list[tuple[Flight, Result]] = []
        for sent in self._sent.values():
            while sent.ready and len(found) < _AT_ONCE:
                custom_id, result = sent.ready.popleft()
                found.append((sent.flights.pop(custom_id), result))
        if not found:
            time.sleep(timeout)
        return found

    def emptied(self) -> None:
        """The results that were returned are stored: record the batches that have no others."""
        for sent in list(self._sent.values()):
            if sent.ready is not None and not sent.ready:
                self._close(sent)

    def end(self) -> list[Flight]:
        """Forget everything that was sent; it is found again in the store. Returns the requests without a result."""
        flights = [flight for sent in self._sent.values() for flight in sent.flights.values()]
        for flight in reversed(flights):
            flight.job.waiting.appendleft(flight.request)
        self._sent = {}
        self._spec = self._client = self.loaded = self._error = None
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        return flights

    def _send(self, job: OpenJob) -> None:
        assert self._client is not None
        requests = {str(request.id): request for request in job.waiting if isinstance(request, Generate)}
        known = self._write(job, lambda session: batches.take(session, job.claim.id, self._place))
        key = (
            known.key
            if known
            else self._write(job, lambda session: batches.begin(session, job.claim.id, self._place, len(requests)))
        )
        batch_id = known.provider_id if known else None
        if known is not None and batch_id is None:
            batch_id = self._find(key)
        if batch_id is None:
            file_id = self._ask(self._client.upload(key, requests))
            self._write(job, lambda session: None)  # not without the lease
            batch_id = self._ask(self._client.create(key, file_id)).id
        if known is None or known.provider_id is None:
            self._write(job, lambda session: batches.note_created(session, key, batch_id))
        flights = {custom_id: Flight(job, request) for custom_id, request in requests.items()}
        job.waiting.clear()
        self._sent[job.claim.id] = _Sent(job, key, batch_id, dict(flights))

    def _try_to_look(self, sent: _Sent) -> None:
        """Look at a batch; if it was deleted at the provider, its requests wait for another one."""
        try:
            self._look(sent)
        except BatchGone:
            sent.job.waiting.extend(flight.request for flight in sent.flights.values())
            self._close(sent)
        except JobLost:
            return  # its heartbeat tells the worker

    def _find(self, key: str) -> str | None:
        """The id of a batch that may have been created just before its worker died."""
        assert self._client is not None
        found = self._ask(self._client.find(key))
        if found is None:
            time.sleep(min(_SETTLE_SECONDS, self._poll_seconds))
            found = self._ask(self._client.find(key))
        return found.id if found else None

    def _look(self, sent: _Sent) -> None:
        assert self._client is not None
        batch = self._ask(self._client.look(sent.batch_id))
        sent.look_at = time.monotonic() + self._poll_seconds
        if batch.finished != sent.finished:
            sent.finished = batch.finished
            self._write(sent.job, lambda session: batches.note_finished(session, sent.key, batch.finished))
        if batch.state == "over":
            sent.ready = deque(self._ask(self._collect(sent, batch)))
            if not sent.ready:  # all are to be sent again
                self._close(sent)
        elif batch.state == "rejected":
            self._close(sent)
            kind = OutageError if batch_api.is_passing(batch) else AccountError
            raise kind(f"the provider rejected batch {batch.id}: {batch.error or 'it does not say why'}")

    async def _collect(self, sent: _Sent, batch: Batch) -> list[tuple[str, Result]]:
        """The results in a batch that is over; its other requests wait to be sent again, a few times at most."""
        assert self._client is not None
        requests = {custom_id: flight.request for custom_id, flight in sent.flights.items()}
        found: dict[str, Result | Again] = {}
        async for custom_id, result in self._client.results(batch, requests):  # type: ignore[arg-type]
            found[custom_id] = result
        ready: list[tuple[str, Result]] = []
        for custom_id, flight in list(sent.flights.items()):
            result, key = found.get(custom_id, Again("the provider returned no result")), (sent.job.claim.id, custom_id)
            if isinstance(result, Again):
                self._asked_again[key] += 1
                self._repeats[key] += result.may_be_charged
                if self._asked_again[key] <= _MOST_AGAIN:
                    del sent.flights[custom_id]
                    sent.job.waiting.append(flight.request)
                    continue
                result = Failed(flight.request.id, f"server_error: {result.why}")
            assert isinstance(result, Generated | Failed)
            ready.append((custom_id, replace(result, repeats=result.repeats + self._repeats.pop(key, 0))))
        return ready

    def _close(self, sent: _Sent) -> None:
        """Forget a batch and record that its results are stored."""
        del self._sent[sent.job.claim.id]
        fence = sent.job.claim.fence
        self._transactions.write(lambda session: batches.note_collected(session, sent.key, fence=fence))

    def _write(self, job: OpenJob, change: Callable[[Session], T]) -> T:
        """Change the store under the job's lease; `JobLost` without it."""

        def write(session: Session) -> T:
            if not queue.hold(session, job.claim, lease=self._lease, is_progress=False):
                raise JobLost
            return change(session)

        return self._transactions.write(write)

    def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run_until_complete(call)
