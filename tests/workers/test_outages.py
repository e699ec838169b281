"""Unavailable servers are waited for, with the wait recorded in the store; locked accounts are not."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner
from sqlalchemy import func, select, update

from persyn.analysis import watch
from persyn.cli.main import persyn
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.time import now
from persyn.db.work import Job, JobState, Outage
from persyn.jobs import queue
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.chat_server import Server, completion, error
from tests.factories import make_job, make_run
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import write_run

TEACHERS = ("ada", "bob")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


def write(folder: Path, server: Server, **run: Any) -> Path:
    """A run file whose teachers are on the server; each request is tried twice there."""
    options = {"base_url": server.base_url, "max_retries": 1, "concurrency": 2}
    given: dict[str, Any] = {"calibration": 4, **run}
    return write_run(folder, prompts=16, teachers=TEACHERS, engine="openai", options=options, **given)


def begin(database: Database, file: Path) -> int:
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def worker(database: Database, folder: Path, run_id: int) -> Worker:
    return Worker(database, Settings(database_url="", home=folder), run_id=run_id)


def run_of(database: Database) -> Run:
    with database.read() as session:
        return session.scalars(select(Run)).one()


def failed_rows(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).where(Response.failure.is_not(None))).one()


def responses(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(Response)).one()


FAULTS: dict[str, Callable[[], web.Response]] = {
    "HTTP 500": lambda: error(500, "down"),
    "an error with HTTP 200": lambda: web.Response(text='{"error": {"message": "overloaded"}}'),
}


@SQLITE
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_outage_is_waited_for_and_costs_no_row_and_no_attempt(
    database: Database, tmp_path: Path, server: Server, fault: Callable[[], web.Response]
) -> None:
    run_id = begin(database, write(tmp_path, server))
    up_at = time.monotonic() + 4
    server.reply = lambda n: fault() if time.monotonic() < up_at else completion("Four.")

    worker(database, tmp_path, run_id).run()

    assert run_of(database).state is RunState.DONE
    assert failed_rows(database) == 0
    with database.read() as session:
        assert session.scalars(select(Outage)).all() == []
        assert session.scalars(select(func.count()).where(Job.state == JobState.FAILED)).one() == 0


@POSTGRESQL
def test_after_outage_seconds_the_run_fails_with_its_rows_pending_and_resume_goes_on(
    database: Database, tmp_path: Path, server: Server
) -> None:
    run_id = begin(database, write(tmp_path, server, outage_seconds=1))
    server.reply = lambda n: error(503, "down for maintenance")

    worker(database, tmp_path, run_id).run()

    run = run_of(database)
    assert run.state is RunState.FAILED
    assert "waited 1 s (outage_seconds)" in (run.error or "")
    assert "HTTP 503: down for maintenance" in (run.error or "")
    assert responses(database) == 0

    server.reply = lambda n: completion("Four.")
    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, run_id), actor="me")
    worker(database, tmp_path, run_id).run()

    assert run_of(database).state is RunState.DONE
    assert failed_rows(database) == 0


@SQLITE
def test_two_workers_wait_for_a_server_and_one_that_is_killed_meanwhile_is_not_missed(
    database: Database, tmp_path: Path, server: Server
) -> None:
    run_id = begin(database, write(tmp_path, server, job_prompts=2))
    server.reply = lambda n: error(500, "down")
    first, second = worker(database, tmp_path, run_id), worker(database, tmp_path, run_id)
    threads = [threading.Thread(target=each.run) for each in (first, second)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(waits(database)))
    first.stop.set()
    threads[0].join()
    server.reply = lambda n: completion("Four.")
    threads[1].join(60)

    assert run_of(database).state is RunState.DONE
    assert failed_rows(database) == 0


def waits(database: Database) -> list[watch.ServerWait]:
    with database.read() as session:
        return watch.snapshot(session, session.scalars(select(Run)).one()).waits


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


@POSTGRESQL
@pytest.mark.parametrize(
    "reply",
    [
        lambda: error(402, "Insufficient credits"),
        lambda: web.json_response({"error": {"message": "no", "code": "insufficient_quota"}}, status=429),
    ],
)
def test_a_locked_account_fails_the_run_at_once_with_its_rows_pending_until_it_is_resumed(
    database: Database, tmp_path: Path, server: Server, reply: Callable[[], web.Response]
) -> None:
    run_id = begin(database, write(tmp_path, server))

    def answer(n: int) -> web.Response:
        return reply() if server.bodies[-1]["model"] == "bob" else completion("Four.")

    server.reply = answer

    worker(database, tmp_path, run_id).run()

    run = run_of(database)
    assert run.state is RunState.FAILED
    assert "and that the account may use them" in (run.error or "")
    assert failed_rows(database) == 0
    assert responses(database) == 4  # of the other teacher

    server.reply = lambda n: completion("Four.")
    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, run_id), actor="me")
    worker(database, tmp_path, run_id).run()

    assert run_of(database).state is RunState.DONE


@SQLITE
def test_what_is_waited_for_is_shown(
    tmp_path: Path, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path))
    monkeypatch.setenv("PERSYN_DATABASE_URL", database.url.render_as_string(hide_password=False))
    begin(database, write(tmp_path, server))
    with database.write() as session:
        claim = queue.claim(session, owner="host/1/1/a")
        assert claim is not None
        assert pipeline.wait_out(session, claim, "no server at http://x", owner="host/1/1/a")

    status = CliRunner().invoke(persyn, ["run", "status", "test"])
    as_json = CliRunner().invoke(persyn, ["run", "status", "test", "--json"])

    said = r"ada, 0:00:\d\d so far; next attempt in 0:00:\d\d; the run fails after 1:00:00 \(outage_seconds\): "
    assert re.search(said + "no server at http://x", status.output)
    (wait,) = json.loads(as_json.output)["waits"]
    assert (wait["model"], wait["limit_seconds"]) == ("ada", 3600)


@POSTGRESQL
def test_a_run_that_nobody_works_is_listed_as_stopped_unless_it_waits_for_a_server(
    tmp_path: Path, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path))
    monkeypatch.setenv("PERSYN_DATABASE_URL", database.url.render_as_string(hide_password=False))

    def state() -> str:
        (row,) = json.loads(CliRunner().invoke(persyn, ["run", "list", "--json"]).output)
        return str(row["state"])

    begin(database, write(tmp_path, server))
    assert state() == "stopped"
    with database.write() as session:
        claim = queue.claim(session, owner="host/1/1/a")
        assert claim is not None
    assert state() == "running"
    with database.write() as session:
        assert pipeline.wait_out(session, claim, "no server at http://x", owner="host/1/1/a")
    assert state() == "waiting"
    with database.write() as session:
        session.execute(update(Outage).values(retry_at=now(timedelta(seconds=-1))))
    assert state() == "stopped"


@SQLITE
def test_a_wait_is_of_one_queue_and_run_and_lasts_however_often_it_is_noted(database: Database) -> None:
    with database.write() as session:
        made = make_run(session)
        jobs = [make_job(session, made.id, queue=name) for name in ("openai.a", "openai.a", "openai.b")]
    with database.write() as session:
        for _ in range(3):
            session.execute(update(Job).values(not_before=None))
            claim = queue.claim(session, owner="me", queue="openai.a")
            assert claim is not None
            assert (claim.id, claim.attempts) == (jobs[0], 1)
            assert pipeline.wait_out(session, claim, "down", owner="me")
        since = session.scalars(select(Outage.since)).one()
        assert queue.claim(session, owner="me", queue="openai.a") is None
        other = queue.claim(session, owner="me", queue="openai.b")
    assert other is not None
    assert other.id == jobs[2]

    with database.write() as session:
        session.execute(update(Outage).values(since=now(timedelta(hours=-2))))
        session.execute(update(Job).where(Job.queue == "openai.a").values(not_before=None))
        claim = queue.claim(session, owner="me", queue="openai.a")
        assert claim is not None
        assert not pipeline.wait_out(session, claim, "down", owner="me")
        states = {row.id: row.state for row in session.execute(select(Job.id, Job.state))}
    assert since is not None
    assert [states[job_id] for job_id in jobs] == [JobState.FAILED, JobState.FAILED, JobState.RUNNING]
