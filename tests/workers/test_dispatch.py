"""One dispatcher leads; if it fails, another takes over within seconds, and the old one writes nothing more."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from datetime import timedelta

import pytest
from sqlalchemy import select, text

from persyn.db.connect import Database
from persyn.db.work import Job, JobState, Leader
from persyn.jobs import queue
from persyn.workers.cluster import app as celery_app
from persyn.workers.cluster.dispatch import Dispatcher
from persyn.workers.cluster.lead import Lead
from tests.cluster import Broker, Cluster, wait_for
from tests.factories import make_job, make_run
from tests.postgres import Postgres

#: The leader's lease in these tests.
LEASE = timedelta(seconds=0.4)
#: From freezing a leader until another has requeued a dead worker's job: the lease, the idle-transaction timeout, some
#: ticks, and an allowance for a busy machine.
SOON = 25.0


def take(database: Database, lead: Lead) -> bool:
    with database.write() as session:
        return lead.take(session)


def hold(database: Database, lead: Lead) -> bool:
    with database.write() as session:
        return lead.hold(session)


def leader(database: Database) -> str | None:
    with database.read() as session:
        return session.scalar(select(Leader.owner))


def job_left_by(database: Database, owner: str) -> int:
    """Create a job of a remote worker whose lease has expired."""
    with database.write() as session:
        job_id = make_job(session, make_run(session, name=uuid.uuid4().hex).id)
        claimed = queue.claim(session, owner=owner, lease=timedelta(seconds=-1))
        assert claimed is not None
    return job_id


def is_taken_back(database: Database, job_id: int) -> bool:
    with database.read() as session:
        return session.get_one(Job, job_id).state is JobState.QUEUED


def test_one_leads_and_the_next_one_once_its_time_is_over(database: Database) -> None:
    first, second = Lead("first", lease=LEASE), Lead("second", lease=LEASE)

    assert take(database, first)
    assert not take(database, second)
    assert take(database, first)
    time.sleep(0.5)
    assert take(database, second)
    assert not hold(database, first)
    assert not take(database, first)
    assert leader(database) == "second"


def test_a_leader_that_was_late_goes_on_where_nobody_took_its_place(database: Database) -> None:
    first = Lead("first", lease=LEASE)
    assert take(database, first)
    time.sleep(0.5)

    assert hold(database, first)


def test_whoever_resigns_is_followed_at_once(database: Database) -> None:
    first, second = Lead("first"), Lead("second")
    assert take(database, first)
    with database.write() as session:
        first.resign(session)
    time.sleep(0.01)

    assert take(database, second)
    with database.write() as session:
        first.resign(session)  # it no longer leads
    assert hold(database, second)


def test_of_many_that_ask_at_the_same_time_one_leads(database: Database) -> None:
    begin, taken = threading.Barrier(6), []

    def ask(name: str) -> None:
        lead = Lead(name)
        begin.wait()
        taken.append(take(database, lead))

    threads = [threading.Thread(target=ask, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True]


def test_a_leader_that_wakes_after_another_has_taken_over_takes_nothing_back(
    database: Database, broker: Broker
) -> None:
    app = celery_app.make(broker.url)
    woken = Dispatcher(database, app, lease_seconds=0.001)
    woken.tick()
    with database.write() as session:
        session.execute(text("UPDATE leader SET fence = fence + 1, owner = 'another'"))
    job_id = job_left_by(database, "gone/1/2/3")
    time.sleep(0.01)
    woken.tick()

    assert not is_taken_back(database, job_id)
    app.close()


@pytest.fixture
def lease_seconds() -> int:
    return 2


def leads(store: Database, cluster: Cluster, name: str) -> bool:
    found = leader(store)
    return found is not None and f"/{cluster.processes[name].pid}/" in found


def require_taken_over(store: Database, cluster: Cluster) -> None:
    """Require that the second dispatcher requeues a job lost now."""
    job_id = job_left_by(store, "gone/1/2/3")
    wait_for(lambda: is_taken_back(store, job_id), SOON, "the job is taken back")
    assert leads(store, cluster, "second")


def test_a_leader_that_is_stopped_holds_nobody_up(cluster: Cluster, store: Database) -> None:
    cluster.start("first", "dispatch")
    wait_for(lambda: leads(store, cluster, "first"), 30, "the first leads")
    cluster.start("second", "dispatch")
    wait_for(lambda: count_dispatchers(store) >= 2, 30, "the second is up")
    time.sleep(3)  # it spares leases that expired before it started
    os.kill(cluster.processes["first"].pid, signal.SIGSTOP)

    require_taken_over(store, cluster)
    os.kill(cluster.processes["first"].pid, signal.SIGCONT)
    time.sleep(2)
    assert leads(store, cluster, "second")


def test_a_leader_behind_a_connection_that_is_frozen_holds_nobody_up_and_ends_as_told(
    cluster: Cluster, store: Database, postgres: Postgres
) -> None:
    through, proxy = postgres.behind(cluster.database_url)
    cluster.start("first", "dispatch", PERSYN_DATABASE_URL=through)
    wait_for(lambda: leads(store, cluster, "first"), 30, "the first leads")
    cluster.start("second", "dispatch")
    wait_for(lambda: count_dispatchers(store) >= 2, 30, "the second is up")
    time.sleep(3)
    proxy.freeze()

    require_taken_over(store, cluster)
    began = time.monotonic()
    os.kill(cluster.processes["first"].pid, signal.SIGTERM)
    assert cluster.processes["first"].wait(timeout=20) == 0, cluster.said("first")
    assert time.monotonic() - began < 10
    proxy.close()


def count_dispatchers(store: Database) -> int:
    """The number of connected processes besides this one."""
    with store.read() as session:
        here = "datname = current_database() AND pid <> pg_backend_pid()"
        return session.scalars(text(f"SELECT count(*) FROM pg_stat_activity WHERE {here}")).one()
