"""The dispatcher: takes back what dead workers held, and rings for what waits.

Several may run; one leads. It keeps nothing: what it would know is in the database, so that any
of it may die, or all of the broker's memory be lost, at the cost of a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from celery import Celery
from sqlalchemy.exc import DBAPIError

from persyn.db.connect import Database
from persyn.errors import shorten
from persyn.jobs import owner, queue
from persyn.runs import pipeline
from persyn.workers.cluster import app as celery_app
from persyn.workers.cluster.lead import Lead

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
#: The longest wait for a database or a broker that is away.
_PATIENCE_SECONDS = 5.0
#: The most messages that lie in one queue: as many idle workers can be woken by it at once.
_MESSAGES = 16
#: How long the database is waited for once a dispatcher has been told to stop.
_STOP_SECONDS = 3.0


class Dispatcher:
    """Sweeps and rings, once a tick, as long as it leads.

    lease_seconds: what workers hold their jobs for; after the database was away, and when it was first reached,
                   nobody's lease counts as run out for so long.
    """

    def __init__(self, database: Database, app: Celery, *, lease_seconds: float) -> None:
        self.stop = threading.Event()
        self._database = database
        self._app = app
        self._actor = owner.name()
        self._lead = Lead(self._actor)
        self._wait = TICK_SECONDS
        self._failures = 0
        self._lease_seconds = lease_seconds
        # It may have been, before this dispatcher began.
        self._was_away = True
        self._patient_until = 0.0

    def run(self) -> None:
        """Tick until `end` is called; outages of broker and database are waited for."""
        while not self.stop.is_set():
            self.tick()
            self.stop.wait(self._wait)
        try:
            with self._database.write() as session:
                self._lead.resign(session)
        except DBAPIError as error:
            log.warning("the lead is left to run out", extra={"error": shorten(str(error.orig))})

    def end(self) -> None:
        """Stop, however the database fares; what it does not answer in seconds is left undone."""
        self.stop.set()
        self._database.hurry(_STOP_SECONDS)

    def tick(self) -> None:
        """Take back lost jobs and ring for waiting ones, if this dispatcher leads. Raises nothing that time mends."""
        try:
            leads = self._leads()
            if self._was_away:
                self._patient_until, self._was_away = time.monotonic() + self._lease_seconds, False
            if leads and self._sweep():
                self._ring()
            self._wait, self._failures = TICK_SECONDS, 0
        except DBAPIError as error:
            self._was_away = True
            self._back_off("the database is away", error.orig)
        except celery_app.AWAY as error:
            self._back_off("the broker is away", error)

    def _back_off(self, what: str, error: BaseException | None) -> None:
        self._failures += 1
        # The first failure may be no more than a connection that broke meanwhile.
        self._wait = min(TICK_SECONDS * 2 ** (self._failures - 1), _PATIENCE_SECONDS)
        log.warning(what, extra={"error": shorten(str(error)), "wait_seconds": self._wait})

    def _leads(self) -> bool:
        with self._database.write() as session:
            return self._lead.take(session)

    def _sweep(self) -> bool:
        """Take back what is lost; False when another leads meanwhile."""
        with self._database.write() as session:
            if not self._lead.hold(session):
                return False
            taken = pipeline.sweep(
                session,
                actor=self._actor,
                dead_owners=owner.dead(queue.owners(session)),
                spare_expired=time.monotonic() < self._patient_until,
            )
        if taken:
            log.info("jobs taken back", extra={"jobs": taken})
        return True

    def _ring(self) -> None:
        with self._database.read() as session:
            waiting = {backlog.queue: backlog.jobs for backlog in queue.backlogs(session)}
        for name, jobs in waiting.items():
            with self._database.read() as session:
                job_ids = queue.due(session, name, limit=min(jobs, _MESSAGES))
            sent = celery_app.ring(self._app, name, job_ids, most=min(jobs, _MESSAGES))
            if sent and not self._note_sent(sent):
                return

    def _note_sent(self, job_ids: Sequence[int]) -> bool:
        # Noted after it was sent: a death between the two sends it twice, which wakes somebody for nothing.
        with self._database.write() as session:
            if not self._lead.hold(session):
                return False
            queue.note_sent(session, job_ids)
        return True
