"""Export Prometheus metrics, read from the store at each scrape in one read transaction.

Labels name runs, stages, queues, teachers and states, never anything that grows with the prompts.
A run that ended more than a day ago is no longer exported.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from persyn.db.catalog import Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.time import now
from persyn.db.work import Job, JobState
from persyn.errors import UsageError
from persyn.jobs import queue

#: How long a finished run is still exported.
_REMEMBERED = timedelta(days=1)
#: Counting responses scans rows, a second or more per million, so it may take at most 1/20 of the time.
_COUNTING_SHARE = 20


class StoreCollector(Collector):
    """A store's metrics. An unavailable store exports only `persyn_up 0`.

    clock: in seconds; replaced in tests.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._responses: list[Metric] = []
        self._count_at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        """Read all metrics again; counts of responses may be older, depending on how long counting takes."""
        found: list[Metric] = []
        try:
            with self._database.read() as session:
                found = [*_runs(session), *_jobs(session), *_queues(session), *self._counted(session)]
        except SQLAlchemyError:
            found = []
        up = GaugeMetricFamily("persyn_up", "1 when the database answers, 0 when it does not.", value=bool(found))
        yield from (up, *found)

    def _counted(self, session: Session) -> list[Metric]:
        began = self._clock()
        if began >= self._count_at:
            self._responses = _responses(session)
            ended = self._clock()
            self._count_at = ended + _COUNTING_SHARE * (ended - began)
        return self._responses


@contextmanager
def serving(database: Database, *, host: str, port: int) -> Iterator[int]:
    """Serve /metrics within the context; yields the port, a free one if 0 was given."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(database))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror}; choose others") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _is_told() -> ColumnElement[bool]:
    return or_(Run.state == RunState.RUNNING, Run.finished_at > now(-_REMEMBERED))


def _runs(session: Session) -> list[Metric]:
    states = GaugeMetricFamily("persyn_run_state", "1 for the state that a run is in.", labels=("run", "state"))
    for name, found in session.execute(select(Run.name, Run.state).where(_is_told())):
        for state in RunState:
            states.add_metric((name, state), state is found)
    return [states]


def _jobs(session: Session) -> list[Metric]:
    labels = ("run", "stage", "queue", "state")
    jobs = GaugeMetricFamily("persyn_jobs", "Jobs.", labels=labels)
    claims = CounterMetricFamily("persyn_job_claims", "Number of attempts of jobs.", labels=("run", "stage"))
    began: defaultdict[tuple[str, str], int] = defaultdict(int)
    rows = session.execute(
        select(Run.name, Job.stage, Job.queue, Job.state, func.count(), func.sum(Job.fence))
        .join(Run, Run.id == Job.run_id)
        .where(_is_told())
        .group_by(Run.name, Job.stage, Job.queue, Job.state)
    )
    for run, stage, name, state, count, fences in rows:
        jobs.add_metric((run, stage, name, state), count)
        began[run, stage] += int(fences)
    for (run, stage), count in began.items():
        claims.add_metric((run, stage), count)
    return [jobs, claims]


def _queues(session: Session) -> list[Metric]:
    """Metrics of each queue with waiting or running jobs."""
    is_queued, is_running = Job.state == JobState.QUEUED, Job.state == JobState.RUNNING
    is_due = and_(is_queued, queue.is_claimable())
    rows = session.execute(
        select(
            Job.queue,
            now().label("at"),
            func.min(case((is_due, func.coalesce(Job.not_before, Job.created_at)))).label("due_since"),
            func.min(case((is_running, Job.heartbeat_at))).label("beat_at"),
            func.count(case((and_(is_running, Job.lease_until < now()), Job.id))).label("expired"),
            func.count(case((is_running, Job.owner)).distinct()).label("workers"),
            func.max(Job.attempts).label("attempts"),
        )
        .where(is_queued | is_running)
        .group_by(Job.queue)
    ).all()
    oldest = _by_queue("persyn_queue_oldest_due_seconds", "Waiting time of the first claimable job.")
    beat = _by_queue("persyn_heartbeat_age_seconds", "Time since the oldest heartbeat of a running job.")
    expired = _by_queue("persyn_jobs_lease_expired", "Running jobs with an expired lease.")
    workers = _by_queue("persyn_workers", "Workers holding a job.")
    attempts = _by_queue("persyn_job_attempts", "Most attempts of an open job since results were last saved.")
    for row in rows:
        oldest.add_metric((row.queue,), _seconds(row.due_since, row.at))
        beat.add_metric((row.queue,), _seconds(row.beat_at, row.at))
        expired.add_metric((row.queue,), row.expired)
        workers.add_metric((row.queue,), row.workers)
        attempts.add_metric((row.queue,), row.attempts)
    return [oldest, beat, expired, workers, attempts]


def _responses(session: Session) -> list[Metric]:
    """Responses by teacher: a single query, and the only one that reads every response's row."""
    responses = CounterMetricFamily("persyn_responses", "Responses stored.", labels=("teacher", "result"))
    tokens = CounterMetricFamily("persyn_response_tokens", "Tokens generated by teachers.", labels=("teacher",))
    counted = (
        select(
            Response.teacher_id,
            func.count(Response.failure).label("failed"),
            func.count().label("stored"),
            func.sum(Response.response_tokens).label("tokens"),
        )
        .group_by(Response.teacher_id)
        .subquery()
    )
    # Versions of a teacher share its name, which would give duplicate series.
    rows = session.execute(
        select(
            Teacher.name,
            func.sum(func.coalesce(counted.c.stored - counted.c.failed, 0)),
            func.sum(func.coalesce(counted.c.failed, 0)),
            func.sum(func.coalesce(counted.c.tokens, 0)),
        )
        .outerjoin(counted, counted.c.teacher_id == Teacher.id)
        .group_by(Teacher.name)
    )
    for teacher, done, failed, written in rows:
        responses.add_metric((teacher, "done"), int(done))
        responses.add_metric((teacher, "failed"), int(failed))
        tokens.add_metric((teacher,), int(written))
    return [responses, tokens]


def _by_queue(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, labels=("queue",))


def _seconds(since: datetime | None, at: datetime) -> float:
    return max(0.0, (at - since).total_seconds()) if since is not None else 0.0
