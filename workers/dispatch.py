"""The dispatcher: takes back what dead workers held, and rings for what waits.

Several may run; one leads. It keeps nothing: what it would know is in the database, so that any
of it may die, or all of the broker's memory be lost, at the cost of a second.
"""

from __future__ import annotations

import logging
import threading
import time

from celery import Celery
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from persyn import pipeline, queue
from persyn.db.connect import Database
from persyn.errors import shorten
from workers import app as celery_app
from workers import owner

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
#: The longest wait for a database or a broker that is away.
_PATIENCE_SECONDS = 5.0
#: The most messages that lie in one queue: as many idle workers can be woken by it at once.
_MESSAGES = 16
#: Names the lock that the leader holds; any number that is nobody else's.
_LEADER_LOCK = 0x5045525360


class Dispatcher:
    """Sweeps and rings, once a tick, as long as it leads.

    lease_seconds: what workers hold their jobs for; after the database was away, and at first, nobody's lease
                   counts as run out for so long.
    """

    def __init__(self, database: Database, app: Celery, *, lease_seconds: float) -> None:
        self.stop = threading.Event()
        self._database = database
        self._app = app
        self._actor = owner.name()
        self._lead: Connection | None = None
        self._wait = TICK_SECONDS
        self._failures = 0
        self._lease_seconds = lease_seconds
        # It may have been, before this dispatcher began.
        self._was_away = True
        self._patient_until = 0.0

    def run(self) -> None:
        """Tick until `stop` is set; outages of broker and database are waited for."""
        try:
            while not self.stop.is_set():
                self.tick()
                self.stop.wait(self._wait)
        finally:
            self._resign()

    def tick(self) -> None:
        """Take back lost jobs and ring for waiting ones, if this dispatcher leads. Raises nothing that time mends."""
        try:
            if self._leads():
                if self._was_away:
                    self._patient_until, self._was_away = time.monotonic() + self._lease_seconds, False
                self._sweep()
                self._ring()
            self._wait, self._failures = TICK_SECONDS, 0
        except DBAPIError as error:
            self._resign()
            self._was_away = True
            self._back_off("the database is away", error.orig)
        except celery_app.AWAY as error:
            self._back_off("the broker is away", error)

    def _back_off(self, what: str, error: BaseException | None) -> None:
        self._failures += 1
        # The first failure may be no more than a connection that broke meanwhile.
        self._wait = min(TICK_SECONDS * 2 ** (self._failures - 1), _PATIENCE_SECONDS)
        log.warning(what, extra={"error": shorten(str(error)), "wait_seconds": self._wait})

    def _sweep(self) -> None:
        with self._database.write() as session:
            taken = pipeline.sweep(
                session,
                actor=self._actor,
                dead_owners=owner.dead(queue.owners(session)),
                spare_expired=time.monotonic() < self._patient_until,
            )
        if taken:
            log.info("jobs taken back", extra={"jobs": taken})

    def _ring(self) -> None:
        with self._database.read() as session:
            waiting = {backlog.queue: backlog.jobs for backlog in queue.backlogs(session)}
        for name, jobs in waiting.items():
            with self._database.read() as session:
                job_ids = queue.due(session, name, limit=min(jobs, _MESSAGES))
            sent = celery_app.ring(self._app, name, job_ids, most=min(jobs, _MESSAGES))
            if sent:
                # Noted after it was sent: a death between the two sends it twice, which wakes somebody for nothing.
                with self._database.write() as session:
                    queue.note_sent(session, sent)

    def _leads(self) -> bool:
        """Hold the leader's lock, which is gone with the connection; a SQLite store has one machine and no lock."""
        if self._database.engine.dialect.name != "postgresql":
            return True
        if self._lead is None:
            self._lead = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return bool(self._lead.scalar(select(func.pg_try_advisory_lock(_LEADER_LOCK))))

    def _resign(self) -> None:
        if self._lead is not None:
            self._lead.invalidate()  # closed, not given back to the pool with the lock still held
            self._lead.close()
            self._lead = None
