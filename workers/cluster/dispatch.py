"""The dispatcher: requeues jobs of dead workers, and notifies workers of waiting jobs.

Several may run; one leads. All state is in the database, so that losing any dispatcher, or all of
the broker's memory, costs a second at most.
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
from persyn.jobs import owner, workload
from persyn.runs import pipeline
from persyn.workers.cluster import app as celery_app
from persyn.workers.cluster.lead import Lead

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
#: Maximum wait for an unavailable database or broker.
_PATIENCE_SECONDS = 5.0
#: Maximum number of messages in a queue; so many idle workers can be woken at once.
_MESSAGES = 16
#: How long to wait for the database after the dispatcher was told to stop.
_STOP_SECONDS = 3.0


class Dispatcher:
    """Sweeps and notifies once per tick while it leads.

    lease_seconds: the lease time of the workers. For this long after the start and after a database outage, no lease
                   counts as expired.
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
        # The database may have been unavailable before the start.
        self._was_away = True
        self._patient_until = 0.0

    def run(self) -> None:
        """Tick until `end` is called; wait for an unavailable broker or database."""
        while not self.stop.is_set():
            self.tick()
            self.stop.wait(self._wait)
        try:
            with self._database.write() as session:
                self._lead.resign(session)
        except DBAPIError as error:
            log.warning("the lead was not released and will expire", extra={"error": shorten(str(error.orig))})

    def end(self) -> None:
        """Stop within seconds even if the database does not answer; unfinished work is abandoned."""
        self.stop.set()
        self._database.hurry(_STOP_SECONDS)

    def tick(self) -> None:
        """Requeue lost jobs and notify workers of waiting ones, if leading. Raises no error that may pass with time."""
        try:
            leads = self._leads()
            if self._was_away:
                self._patient_until, self._was_away = time.monotonic() + self._lease_seconds, False
            if leads and self._sweep():
                self._ring()
            self._wait, self._failures = TICK_SECONDS, 0
        except DBAPIError as error:
            self._was_away = True
            self._back_off("the database is unavailable", error.orig)
        except celery_app.BROKER_ERRORS as error:
            self._back_off("the broker is unavailable", error)

    def _back_off(self, what: str, error: BaseException | None) -> None:
        self._failures += 1
        # A first failure may just be a connection that broke while idle.
        self._wait = min(TICK_SECONDS * 2 ** (self._failures - 1), _PATIENCE_SECONDS)
        log.warning(what, extra={"error": shorten(str(error)), "wait_seconds": self._wait})

    def _leads(self) -> bool:
        with self._database.write() as session:
            return self._lead.take(session)

    def _sweep(self) -> bool:
        """Take back lost jobs; False if another dispatcher has taken the lead."""
        with self._database.write() as session:
            if not self._lead.hold(session):
                return False
            taken = pipeline.sweep(
                session,
                actor=self._actor,
                dead_owners=owner.dead(workload.owners(session)),
                spare_expired=time.monotonic() < self._patient_until,
            )
        if taken:
            log.info("lost jobs requeued", extra={"jobs": taken})
        return True

    def _ring(self) -> None:
        with self._database.read() as session:
            waiting = {backlog.queue: backlog.jobs for backlog in workload.backlogs(session)}
        for name, jobs in waiting.items():
            with self._database.read() as session:
                job_ids = workload.due(session, name, limit=min(jobs, _MESSAGES))
            sent = celery_app.notify(self._app, name, job_ids, most=min(jobs, _MESSAGES))
            if sent and not self._note_sent(sent):
                return

    def _note_sent(self, job_ids: Sequence[int]) -> bool:
        # Recorded after sending: a crash in between sends a message twice, which merely wakes a worker.
        with self._database.write() as session:
            if not self._lead.hold(session):
                return False
            workload.note_sent(session, job_ids)
        return True
