"""Suspended workers, and workers behind half-open connections, do not block others."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select

from persyn.analysis import audit
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response, Router
from persyn.db.work import Job, JobState
from persyn.jobs import queue
from persyn.workers.runner.heartbeat import Leases
from tests.cluster import Cluster, wait_for
from tests.factories import make_job, make_run
from tests.postgres import Postgres
from tests.proxy import Proxy
from tests.run_files import write_run


@pytest.fixture
def lease_seconds() -> int:
    return 4


@pytest.fixture
def behind(postgres: Postgres, cluster: Cluster) -> Iterator[tuple[str, Proxy]]:
    """The cluster's store through a proxy."""
    through, proxy = postgres.behind(cluster.database_url)
    yield through, proxy
    proxy.close()


def responses(store: Database) -> int:
    with store.read() as session:
        return session.scalars(select(func.count()).select_from(Response)).one()


def is_done(store: Database) -> bool:
    with store.read() as session:
        return session.scalar(select(Run.state)) is RunState.DONE


def test_sigterm_ends_a_worker_whose_database_is_cut_off_and_nothing_is_lost(
    cluster: Cluster, store: Database, behind: tuple[str, Proxy], tmp_path: Path
) -> None:
    through, proxy = behind
    cluster.worker("one", PERSYN_DATABASE_URL=through)
    options = {"latency_seconds": 0.1, "concurrency": 2}
    cluster.start("run", "run", "start", str(write_run(tmp_path, options=options)))
    wait_for(lambda: responses(store) > 3, 60, "some responses are there")
    proxy.freeze()
    time.sleep(1)
    began = time.monotonic()
    os.kill(cluster.processes["one"].pid, signal.SIGTERM)

    assert cluster.processes["one"].wait(timeout=60) == 0, cluster.said("one")
    assert time.monotonic() - began < 30
    cluster.worker("two")
    wait_for(lambda: is_done(store), 120, "another worker goes on")
    with store.read() as session:
        assert set(session.scalars(select(Job.state))) == {JobState.DONE}
        assert list(audit.audit(session, session.scalars(select(Run)).one())) == []


def test_a_worker_that_cannot_renew_for_a_lease_knows_it(postgres: Postgres) -> None:
    url = postgres.create(f"t{uuid.uuid4().hex}", template="migrated")
    through, proxy = postgres.behind(url)
    database = Database(through, silence_seconds=0.5)
    with database.write() as session:
        make_job(session, make_run(session).id)
    with Leases(database, timedelta(seconds=2)) as leases:
        with database.write() as session:
            claim = queue.claim(session, owner="me", lease=timedelta(seconds=2))
        assert claim is not None
        leases.add(claim)
        time.sleep(2.5)
        assert leases.are_kept

        proxy.freeze()
        wait_for(lambda: not leases.are_kept, 10, "it is known")
        proxy.thaw()
        wait_for(lambda: leases.are_kept, 10, "it is renewed again")
    database.close()
    proxy.close()


def test_whoever_was_suspended_in_a_fit_wakes_without_harm_to_the_router_that_another_fitted(
    cluster: Cluster, store: Database, tmp_path: Path
) -> None:
    cluster.worker("one")
    cluster.start("dispatch", "dispatch")
    cluster.start("run", "run", "start", str(write_run(tmp_path, fit_seconds=2)))
    wait_for(lambda: is_fitting(store), 90, "the router is being fitted")
    suspended = psutil.Process(cluster.processes["one"].pid)
    family = [suspended, *suspended.children(recursive=True)]
    for process in family:
        process.suspend()
    cluster.worker("two")
    wait_for(lambda: is_done(store), 120, "another worker goes on")
    with store.read() as session:
        path, digest = session.execute(select(Router.path, Router.sha256)).one()
    for process in reversed(family):  # the worker last, or it might end the others before they wake
        process.resume()
    time.sleep(4)  # it finishes its fit

    folders = list((tmp_path / "home" / "routers").iterdir())
    assert folders == [tmp_path / "home" / path]
    assert hashlib.sha256((folders[0] / "router.msgpack").read_bytes()).hexdigest() == digest
    with store.read() as session:
        assert len(session.scalars(select(Router.id)).all()) == 1


def is_fitting(store: Database) -> bool:
    with store.read() as session:
        fits = Job.stage == "fit_router", Job.state == JobState.RUNNING
        return session.scalar(select(Job.id).where(*fits)) is not None
