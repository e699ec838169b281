"""The heartbeat: a thread with its own connection that keeps this process's leases alive, also while a model loads."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from sqlalchemy.exc import DBAPIError

from persyn import queue
from persyn.db.connect import Database
from persyn.queue import Claim

log = logging.getLogger(__name__)


class Leases:
    """The jobs this process holds. A job that was taken away, or could not be renewed for a whole lease, is lost."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}
        self._lost: set[int] = set()
        self._renewed_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def add(self, job: Claim) -> None:
        """Renew a job that was just claimed from now on."""
        with self._lock:
            self._held[job.id] = job.fence
            self._lost.discard(job.id)

    def remove(self, job: Claim) -> None:
        """Stop renewing a job."""
        with self._lock:
            self._held.pop(job.id, None)

    def lost(self) -> set[int]:
        """The ids of jobs that are held no more and were not given up here."""
        with self._lock:
            lost, self._lost = self._lost, set()
            return lost

    def beat(self) -> None:
        """Renew everything held, once."""
        with self._lock:
            held = dict(self._held)
        if not held:
            self._renewed_at = time.monotonic()
            return
        try:
            with self._database.write() as session:
                gone = queue.extend(session, held)
            self._renewed_at = time.monotonic()
        except DBAPIError as error:
            log.warning("a heartbeat could not be written", extra={"error": str(error.orig)})
            gone = set(held) if time.monotonic() - self._renewed_at > queue.LEASE.total_seconds() else set()
        with self._lock:
            self._lost |= {job_id for job_id in gone if self._held.get(job_id) == held[job_id]}
            for job_id in self._lost:
                self._held.pop(job_id, None)

    def _run(self) -> None:
        while not self._over.wait(queue.BEAT.total_seconds()):
            self.beat()
