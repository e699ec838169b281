"""Pitfalls in the documented behaviour of Celery and Redis, and how PerSyn avoids them."""

from __future__ import annotations

import json
import pickle
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Exchange, Queue
from sqlalchemy import func, select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Event, Job, JobState
from persyn.runs import pipeline, run_file
from persyn.workers.cluster import app as celery_app
from tests.cluster import Broker, Cluster, wait_for
from tests.postgres import Postgres
from tests.run_files import TEACHERS, write_run

GRID = 12 * len(TEACHERS)
NEEDED = GRID + 60 - 12


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    store = Database(postgres.create(f"t{uuid.uuid4().hex}", template="migrated"))
    yield store
    store.close()


@pytest.fixture
def cluster(tmp_path: Path, database: Database, broker: Broker) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, database.url.render_as_string(hide_password=False), broker)
    yield cluster
    cluster.stop()


def start(database: Database, folder: Path, **options: Any) -> Path:
    """Start a run that waits for workers; return the journal of its engines' requests."""
    journal = folder / "journal"
    file = write_run(folder, options={"journal": str(journal), **options})
    with database.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="me")
    return journal


def ring(broker: Broker, name: str, job_ids: list[int]) -> None:
    app = celery_app.make(broker.url)
    celery_app.notify(app, name, job_ids, most=1000)
    app.close()


def jobs(database: Database, *where: Any) -> list[tuple[int, str]]:
    with database.read() as session:
        return [(id_, name) for id_, name in session.execute(select(Job.id, Job.queue).where(*where).order_by(Job.id))]


def count(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(Response)).one()


def is_done(database: Database) -> bool:
    with database.read() as session:
        return session.scalars(select(Run.state)).one() is RunState.DONE


def unacknowledged(broker: Broker) -> int:
    with broker.client() as client:
        return int(client.hlen("persyn:unacked"))


def test_a_message_that_comes_again_for_a_running_or_finished_job_starts_nothing(
    cluster: Cluster, database: Database, broker: Broker, tmp_path: Path
) -> None:
    journal = start(database, tmp_path, latency_seconds=0.1, concurrency=4)
    cluster.start("dispatch", "dispatch")
    for name in ("one", "two"):
        cluster.worker(name)
    wait_for(lambda: count(database) > 3, 30, "some responses are there")

    for _ in range(20):
        for job_id, name in jobs(database, Job.state.in_((JobState.RUNNING, JobState.DONE))):
            ring(broker, name, [job_id])

    wait_for(lambda: is_done(database), 60, "the run is done")
    asked = journal.read_text().splitlines()
    assert len(asked) == len(set(asked)) == NEEDED == count(database)


def test_a_message_is_acknowledged_before_its_job_is_worked_so_that_no_timeout_gives_it_out_again(
    cluster: Cluster, database: Database, broker: Broker, tmp_path: Path
) -> None:
    start(database, tmp_path, latency_seconds=2.0, concurrency=4)
    cluster.start("dispatch", "dispatch")
    cluster.worker("one")
    wait_for(lambda: bool(jobs(database, Job.state == JobState.RUNNING)), 30, "a job runs")

    wait_for(lambda: unacknowledged(broker) == 0, 1, "nothing waits for the visibility timeout while a job runs")
    assert jobs(database, Job.state == JobState.RUNNING)


def test_a_busy_worker_reserves_no_message_that_another_could_take(
    cluster: Cluster, database: Database, broker: Broker, tmp_path: Path
) -> None:
    start(database, tmp_path, latency_seconds=2.0, concurrency=1)
    cluster.worker("one")
    ((first, name), *_) = jobs(database)
    ring(broker, name, [first])
    wait_for(lambda: bool(jobs(database, Job.state == JobState.RUNNING)), 30, "a job runs")

    ring(broker, name, [first] * 8)
    time.sleep(2)

    with broker.client() as client:
        assert client.llen(f"persyn:{name}") == 8
    assert unacknowledged(broker) == 0


def test_hostile_messages_are_not_executed_and_stop_nobody(
    cluster: Cluster, database: Database, broker: Broker, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    start(database, tmp_path)
    cluster.worker("one")
    name = jobs(database)[0][1]
    wait_for(lambda: '"ready"' in cluster.said("one"), 30, "the worker is up")
    time.sleep(2)  # it is listening to the queue

    for what in ("pickle", "words", "another task", "no JSON"):
        send_hostile(broker, name, what, mark)
        time.sleep(0.5)
    cluster.start("dispatch", "dispatch")

    wait_for(lambda: is_done(database), 60, "the run is done")
    assert not mark.exists()
    assert cluster.processes["one"].poll() is None
    with database.read() as session:
        assert session.scalars(select(func.count()).where(Event.to_state == JobState.FAILED)).one() == 0


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def send_hostile(broker: Broker, name: str, what: str, mark: Path) -> None:
    app = celery_app.make(broker.url)
    with app.producer_pool.acquire(block=True) as producer:
        to = {"exchange": Exchange(name), "routing_key": name, "declare": [Queue(name, Exchange(name), name)]}
        headers = {"task": celery_app.TASK, "id": uuid.uuid4().hex}
        if what == "pickle":
            body = pickle.dumps(((), {"job_id": Touch(mark)}, {}))
            kind = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}
            producer.publish(body, headers=headers, **kind, **to)
        elif what == "words":
            body = json.dumps([[], {"job_id": f"__import__('pathlib').Path({str(mark)!r}).touch()"}, {}])
            producer.publish(body, headers=headers, content_type="application/json", content_encoding="utf-8", **to)
        elif what == "another task":
            body = json.dumps([[["touch", str(mark)]], {}, {}])
            headers["task"] = "celery.backend_cleanup"
            producer.publish(body, headers=headers, content_type="application/json", content_encoding="utf-8", **to)
        else:
            body = b64encode(b"{{{").decode()
            producer.publish(body, headers=headers, content_type="application/json", content_encoding="utf-8", **to)
    app.close()
