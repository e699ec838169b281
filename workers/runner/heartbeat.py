"""Keep this process's leases alive from a thread with its own connection, also while a model loads."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from types import TracebackType

from sqlalchemy.exc import DBAPIError

from persyn.db.connect import Database
from persyn.errors import shorten
from persyn.jobs import queue
from persyn.jobs.queue import Claim

log = logging.getLogger(__name__)

#: How long leases are renewed for a worker whose main loop is stuck. The loop reports many times a minute; a hung
#: worker would otherwise keep its jobs forever.
_PATIENCE_SECONDS = 600.0


class Leases:
    """The jobs held by this process; a job taken away by others is lost.

    lease:            how long each renewal holds.
    patience_seconds: how long they are renewed without a call of `alive`.

    While the database is down nothing is lost, because nobody else can claim jobs either; if one is claimed when
    it is back, the fence rejects this process's writes.
    """

    def __init__(self, database: Database, lease: timedelta, *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._database = database
        self.lease = lease
        self._lock = threading.Lock()
        self._held: dict[int, Claim] = {}
        self._lost: set[int] = set()
        self._turned: set[int] = set()
        self._patience_seconds = patience_seconds
        self._alive_at = self._renewed_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def alive(self) -> None:
        """Report that the main loop is running."""
        self._alive_at = time.monotonic()

    def renewed(self) -> None:
        """Record that the database has just accepted a write of this worker."""
        self._renewed_at = time.monotonic()

    @property
    def are_kept(self) -> bool:
        """Whether the last renewal is less than a lease ago; otherwise the jobs may have other holders by now."""
        return time.monotonic() - self._renewed_at < self.lease.total_seconds()

    def add(self, job: Claim) -> None:
        """Start renewing a claimed job."""
        self.renewed()
        with self._lock:
            self._held[job.id] = job
            self._lost.discard(job.id)
            self._turned.discard(job.id)

    def remove(self, job: Claim) -> None:
        """Stop renewing a job."""
        with self._lock:
            self._held.pop(job.id, None)

    def lost(self) -> set[int]:
        """The ids of jobs that are no longer held, although they were not given up here."""
        with self._lock:
            lost, self._lost = self._lost, set()
            return lost

    def turned(self) -> set[int]:
        """The ids of held jobs that were moved to another queue, since the last call."""
        with self._lock:
            turned, self._turned = self._turned, set()
            return turned

    def beat(self) -> None:
        """Renew all held leases once."""
        with self._lock:
            held = dict(self._held)
        if not held:
            return
        if (still := time.monotonic() - self._alive_at) > self._patience_seconds:
            log.error("the worker is blocked; its leases will expire", extra={"seconds": still, "jobs": sorted(held)})
            return
        try:
            with self._database.write() as session:
                gone = queue.extend(session, {job.id: job.fence for job in held.values()}, lease=self.lease)
                turned = queue.turned(session, held.values())
        except DBAPIError as error:
            log.warning("a heartbeat could not be written", extra={"error": shorten(str(error.orig))})
            return
        self.renewed()
        with self._lock:
            self._lost |= {job_id for job_id in gone if self._held.get(job_id) == held[job_id]}
            self._turned |= {job_id for job_id in turned if self._held.get(job_id) == held[job_id]}
            for job_id in self._lost:
                self._held.pop(job_id, None)

    def _run(self) -> None:
        while not self._over.wait(self.lease.total_seconds() / queue.BEATS):
            self.beat()
