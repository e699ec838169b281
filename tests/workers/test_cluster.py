"""Celery workers with a real broker give the same results as a single process, and lose nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Event, Job, JobState, Outage
from persyn.jobs import workload
from persyn.workers.cluster import app as celery_app
from persyn.workers.cluster import roll_call
from tests.chat_server import Server, completion, error
from tests.cluster import Broker, Cluster, wait_for
from tests.one_database import POSTGRESQL
from tests.run_files import PROMPTS, TEACHERS, write_run

GRID = 12 * len(TEACHERS)
NEEDED = GRID + PROMPTS - 12


@pytest.fixture
def cluster(tmp_path: Path, database_url: str, broker: Broker) -> Iterator[Cluster]:
    # The jobs of a killed worker are free after its lease, which is 90 s by default.
    cluster = Cluster(tmp_path, database_url, broker, PERSYN_LEASE_SECONDS="20")
    yield cluster
    cluster.stop()


def count(database: Database, what: object, *where: object) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(what).where(*where)).one()


def is_done(database: Database) -> bool:
    with database.read() as session:
        return session.scalar(select(Run.state)) is RunState.DONE


def require_complete(database: Database, *, responses: int = NEEDED) -> None:
    with database.read() as session:
        assert session.scalars(select(Run.state)).one() is RunState.DONE
        assert set(session.scalars(select(Job.state))) == {JobState.DONE}
    assert count(database, Response) == responses


def test_two_workers_and_a_dispatcher_work_a_run_that_somebody_watches(
    cluster: Cluster, database: Database, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        cluster.worker(name)
    cluster.start("dispatch", "dispatch")
    watch = cluster.start("run", "run", "start", str(write_run(tmp_path, options={"latency_seconds": 0.05})))

    assert watch.wait(timeout=60) == 0, cluster.said("run")
    require_complete(database)
    assert (tmp_path / "home" / "datasets" / "test").is_dir()
    for name in ("one", "two", "dispatch"):
        os.kill(cluster.processes[name].pid, signal.SIGTERM)
        assert cluster.processes[name].wait(timeout=20) == 0, cluster.said(name)
    for line in cluster.said("one").splitlines():
        assert isinstance(json.loads(line), dict), line


@POSTGRESQL
def test_a_run_goes_on_when_its_window_is_closed(cluster: Cluster, database: Database, tmp_path: Path) -> None:
    cluster.worker("one")
    cluster.start("dispatch", "dispatch")
    watch = cluster.start("run", "run", "start", str(write_run(tmp_path, options={"latency_seconds": 0.05})))
    wait_for(lambda: count(database, Response) > 0, 30, "a response is there")
    os.kill(watch.pid, signal.SIGINT)

    assert watch.wait(timeout=10) == 130
    assert "the run continues without this window" in cluster.said("run")
    wait_for(lambda: is_done(database), 60, "the run is done")


@POSTGRESQL
def test_sigterm_gives_the_jobs_back_and_counts_no_attempt(
    cluster: Cluster, database: Database, tmp_path: Path
) -> None:
    cluster.worker("one")
    options = {"latency_seconds": 0.2, "concurrency": 2}
    cluster.start("run", "run", "start", str(write_run(tmp_path, options=options)))
    wait_for(lambda: count(database, Response) > 3, 30, "some responses are there")
    began = time.monotonic()
    os.kill(cluster.processes["one"].pid, signal.SIGTERM)

    assert cluster.processes["one"].wait(timeout=20) == 0, cluster.said("one")
    assert time.monotonic() - began < 10
    assert count(database, Job, Job.state == JobState.RUNNING) == 0
    assert count(database, Job, Job.attempts > 0) == 0
    cluster.worker("two")
    wait_for(lambda: is_done(database), 60, "another worker goes on")
    require_complete(database)


@POSTGRESQL
def test_a_broker_that_is_killed_and_loses_everything_costs_only_time(
    cluster: Cluster, database: Database, broker: Broker, tmp_path: Path
) -> None:
    cluster.worker("one")
    cluster.start("dispatch", "dispatch")
    cluster.start("run", "run", "start", str(write_run(tmp_path, options={"latency_seconds": 0.1, "concurrency": 4})))
    wait_for(lambda: count(database, Response) > 3, 30, "some responses are there")
    broker.kill()
    time.sleep(1)
    broker.start()
    wait_for(lambda: count(database, Response) > 20, 60, "work goes on")
    broker.wipe()

    wait_for(lambda: is_done(database), 120, "the run is done")
    require_complete(database)


def test_a_killed_worker_loses_only_what_its_engine_was_computing(
    cluster: Cluster, database: Database, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    options = {"latency_seconds": 0.1, "concurrency": 4, "journal": str(journal)}
    cluster.worker("one")
    cluster.start("run", "run", "start", str(write_run(tmp_path, options=options)))
    wait_for(lambda: count(database, Response) > 3, 30, "some responses are there")
    cluster.kill("one")
    cluster.worker("two")

    wait_for(lambda: is_done(database), 60, "the run is done")
    require_complete(database)
    asked = journal.read_text().splitlines()
    assert len(set(asked)) == NEEDED
    assert len(asked) - NEEDED <= 2 * 4
    assert count(database, Event, Event.detail["reason"].as_string() == "owner died") > 0


@POSTGRESQL
def test_workers_wait_for_a_server_also_when_one_of_them_is_killed(
    cluster: Cluster, database: Database, tmp_path: Path
) -> None:
    with Server.running() as server:
        server.reply = lambda n: error(500, "down")
        options = {"base_url": server.base_url, "max_retries": 0, "concurrency": 2}
        file = write_run(tmp_path, engine="openai", options=options)
        for name in ("one", "two"):
            cluster.worker(name)
        cluster.start("dispatch", "dispatch")
        cluster.start("run", "run", "start", str(file))
        wait_for(lambda: count(database, Outage) == len(TEACHERS), 30, "both teachers wait for the server")
        cluster.kill("one")
        assert count(database, Response) == 0
        server.reply = lambda n: completion("Four.")

        wait_for(lambda: is_done(database), 120, "the run is done")
    require_complete(database)
    assert count(database, Response, Response.failure.is_not(None)) == 0
    assert count(database, Outage) == 0


@POSTGRESQL
def test_a_worker_says_its_version_and_what_it_takes_also_while_it_works(
    cluster: Cluster, database: Database, broker: Broker, tmp_path: Path
) -> None:
    cluster.worker("picky", "--models", "nothing-has-this-name")
    cluster.worker("one")
    cluster.start("run", "run", "start", str(write_run(tmp_path, options={"latency_seconds": 0.5, "concurrency": 2})))
    wait_for(lambda: count(database, Response) > 0, 60, "a response is there")

    app = celery_app.make(broker.url)
    present = roll_call.call_roll(app)
    app.close()

    assert [worker.host.partition("@")[0] for worker in present] == ["one", "picky"]
    assert {worker.version for worker in present} == {roll_call.version()}
    with database.read() as session:
        waiting = workload.backlogs(session)
    assert waiting
    assert roll_call.untaken(waiting, present) == []
    assert roll_call.untaken(waiting, present[1:]) == waiting


@POSTGRESQL
def test_who_watches_a_run_is_told_of_a_queue_that_no_worker_takes(
    cluster: Cluster, database: Database, tmp_path: Path
) -> None:
    cluster.worker("picky", "--models", "nothing-has-this-name")
    watch = cluster.start("run", "run", "start", str(write_run(tmp_path)))

    wait_for(lambda: "no running worker takes them" in cluster.said("run"), 60, "it is said")
    assert count(database, Response) == 0
    os.kill(watch.pid, signal.SIGINT)
    assert watch.wait(timeout=10) == 130
