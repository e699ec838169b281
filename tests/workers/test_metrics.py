"""The Prometheus metrics agree with the store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.time import now
from persyn.db.work import Job, JobState
from persyn.errors import UsageError
from persyn.jobs import queue
from persyn.workers.cluster import metrics
from tests.factories import make_response, make_run, make_teacher

Read = Callable[..., float | None]


@pytest.fixture
def read(database: Database) -> Read:
    """The value of a series in a new scrape; None if it is missing."""

    def value(name: str, **labels: str) -> float | None:
        registry = CollectorRegistry()
        registry.register(metrics.StoreCollector(database))
        return registry.get_sample_value(name, labels)

    return value


def add_jobs(database: Database, count: int, *, run: str = "run", **values: Any) -> int:
    """Queue jobs of a new run; return the run's id."""
    row = {"stage": "generate", "queue": "vllm.a", "first_prompt_id": 1, "last_prompt_id": 9, "n_prompts": 9, **values}
    with database.write() as session:
        run_id = make_run(session, name=run, prompts=1).id
        session.add_all(Job(run_id=run_id, **row) for _ in range(count))
    return run_id


def claim(database: Database, owner: str) -> None:
    with database.write() as session:
        assert queue.claim(session, owner=owner) is not None


def test_an_empty_store_is_up(read: Read) -> None:
    assert read("persyn_up") == 1


def test_jobs_are_counted_by_run_stage_queue_and_state(database: Database, read: Read) -> None:
    add_jobs(database, 3)
    claim(database, "a")

    labels = {"run": "run", "stage": "generate", "queue": "vllm.a"}
    assert read("persyn_jobs", **labels, state="queued") == 2
    assert read("persyn_jobs", **labels, state="running") == 1
    assert read("persyn_job_claims_total", run="run", stage="generate") == 1
    assert read("persyn_job_attempts", queue="vllm.a") == 1


def test_a_workers_jobs_count_once(database: Database, read: Read) -> None:
    add_jobs(database, 4)
    for owner in ("a", "a", "b"):
        claim(database, owner)
    assert read("persyn_workers", queue="vllm.a") == 2


def test_a_lease_that_ran_out_and_a_heartbeat_that_is_late(database: Database, read: Read) -> None:
    add_jobs(database, 2)
    for owner in ("a", "b"):
        claim(database, owner)
    assert read("persyn_jobs_lease_expired", queue="vllm.a") == 0
    with database.write() as session:
        late = {"lease_until": now(timedelta(seconds=-10)), "heartbeat_at": now(timedelta(seconds=-100))}
        session.execute(update(Job).where(Job.owner == "a").values(**late))

    assert read("persyn_jobs_lease_expired", queue="vllm.a") == 1
    assert read("persyn_heartbeat_age_seconds", queue="vllm.a") == pytest.approx(100, abs=30)


def test_the_oldest_job_that_may_be_claimed_sets_the_age(database: Database, read: Read) -> None:
    add_jobs(database, 1, created_at=now(timedelta(hours=-2)), not_before=now(timedelta(hours=1)))
    assert read("persyn_queue_oldest_due_seconds", queue="vllm.a") == 0
    add_jobs(database, 1, run="other", created_at=now(timedelta(hours=-1)))
    assert read("persyn_queue_oldest_due_seconds", queue="vllm.a") == pytest.approx(3600, abs=60)


def test_a_queue_without_open_jobs_is_not_told_of(database: Database, read: Read) -> None:
    add_jobs(database, 1, state=JobState.DONE)
    assert read("persyn_workers", queue="vllm.a") is None
    assert read("persyn_jobs", run="run", stage="generate", queue="vllm.a", state="done") == 1


def test_a_run_is_in_one_state(database: Database, read: Read) -> None:
    run_id = add_jobs(database, 1)
    with database.write() as session:
        session.execute(update(Run).where(Run.id == run_id).values(state=RunState.FAILED, finished_at=now()))
    assert [read("persyn_run_state", run="run", state=state) for state in RunState] == [
        state is RunState.FAILED for state in RunState
    ]


def test_a_run_that_is_long_over_is_told_of_no_more(database: Database, read: Read) -> None:
    run_id = add_jobs(database, 1)
    with database.write() as session:
        ended = {"state": RunState.DONE, "finished_at": now(timedelta(days=-2))}
        session.execute(update(Run).where(Run.id == run_id).values(**ended))
    assert read("persyn_run_state", run="run", state="done") is None
    assert read("persyn_jobs", run="run", stage="generate", queue="vllm.a", state="queued") is None


def test_responses_and_tokens_are_counted_by_teacher_over_its_versions(database: Database, read: Read) -> None:
    with database.write() as session:
        run = make_run(session, prompts=3)
        other = make_teacher(session, "a", fingerprint="f" * 64)
        make_response(session, run.prompt_ids[0], run.teacher_ids[0], "one two three")
        make_response(session, run.prompt_ids[1], run.teacher_ids[0], None, failure="too_long")
        make_response(session, run.prompt_ids[0], other, "four")

    assert read("persyn_responses_total", teacher="a", result="done") == 2
    assert read("persyn_responses_total", teacher="a", result="failed") == 1
    assert read("persyn_response_tokens_total", teacher="a") == 4
    assert read("persyn_responses_total", teacher="b", result="done") == 0


def test_no_label_grows_with_the_prompts(database: Database) -> None:
    def series() -> int:
        return sum(len(metric.samples) for metric in metrics.StoreCollector(database).collect())

    with database.write() as session:
        run = make_run(session, prompts=40)
        make_response(session, run.prompt_ids[0], run.teacher_ids[0])
    before = series()
    with database.write() as session:
        for prompt_id in run.prompt_ids[1:]:
            make_response(session, prompt_id, run.teacher_ids[0])
    assert series() == before


def test_responses_are_counted_in_a_small_part_of_the_time(database: Database) -> None:
    clock = iter([100.0, 102.0, 141.0, 142.0, 143.0])
    collector = metrics.StoreCollector(database, clock=lambda: next(clock))
    with database.write() as session:
        run = make_run(session, prompts=2)
        make_response(session, run.prompt_ids[0], run.teacher_ids[0])
    registry = CollectorRegistry()
    registry.register(collector)

    def stored() -> float | None:
        return registry.get_sample_value("persyn_responses_total", {"teacher": "a", "result": "done"})

    assert stored() == 1  # counting took from 100 to 102
    with database.write() as session:
        make_response(session, run.prompt_ids[1], run.teacher_ids[0])
    assert stored() == 1  # at 141
    assert stored() == 2  # at 142


def test_a_store_that_is_away_is_down_and_comes_back(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'here' / 'persyn.db'}")
    collector = metrics.StoreCollector(database)

    def told() -> dict[str, float]:
        return {metric.name: metric.samples[0].value for metric in collector.collect() if metric.samples}

    assert told() == {"persyn_up": 0}
    database.require_head()
    assert told() == {"persyn_up": 1}
    database.close()
    shutil.rmtree(tmp_path / "here")
    assert told() == {"persyn_up": 0}


def test_a_server_that_does_not_answer_is_down() -> None:
    database = Database("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    (up,) = metrics.StoreCollector(database).collect()
    assert up.samples[0].value == 0


def test_a_port_that_is_taken_is_named(database: Database) -> None:
    with (
        metrics.serving(database, host="127.0.0.1", port=0) as port,
        pytest.raises(UsageError, match=str(port)),
        metrics.serving(database, host="127.0.0.1", port=port),
    ):
        pass


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path, database_url: str) -> None:
    environment = {**os.environ, "PERSYN_DATABASE_URL": database_url, "PERSYN_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "persyn.cli", "metrics", "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(url) as answer:
            families = {family.name for family in text_string_to_metric_families(answer.read().decode())}
        assert {"persyn_up", "persyn_jobs", "persyn_workers", "persyn_responses"} <= families
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
