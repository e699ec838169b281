"""A run that is paused is worked no further and loses nothing; runs of a higher priority are worked first."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import func, select, update

from persyn.cli.main import persyn
from persyn.cli.run import EXIT_PAUSED
from persyn.db import lookup
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Event, Job, JobState
from persyn.errors import UsageError
from persyn.jobs import queue, workload
from persyn.jobs.workload import Backlog
from persyn.runs import pipeline, run_file, scheduling
from persyn.settings import Settings
from persyn.stages.registry import STAGES
from persyn.workers.runner import affinity
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.claims import Claims
from persyn.workers.runner.ledger import Ledger
from persyn.workers.runner.worker import Worker
from tests.cluster import wait_for
from tests.factories import make_job, make_run
from tests.run_files import PROMPTS, write_run


@pytest.fixture
def store(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    shutil.copy(migrated, tmp_path / "persyn.db")
    monkeypatch.setenv("PERSYN_DATABASE_URL", f"sqlite:///{tmp_path / 'persyn.db'}")
    return Database(f"sqlite:///{tmp_path / 'persyn.db'}")


def test_a_run_is_paused_while_it_is_worked_and_goes_on(store: Database, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    # Jobs that take long: the worker has to give one back before it is done.
    options = {"latency_seconds": 0.05, "concurrency": 2, "journal": str(journal)}
    file = write_run(tmp_path, options=options, job_prompts=60, strategy="random", teachers=("ada", "bob"))
    with store.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    where = {"PERSYN_HOME": str(tmp_path / "home"), "PERSYN_LEASE_SECONDS": "1"}
    worker = Worker(store, Settings.from_environment(where), run_id=run_id)
    working = threading.Thread(target=worker.run)
    working.start()
    wait_for(lambda: len(asked(journal)) >= 4, 60, "a few requests are answered")

    said = CliRunner().invoke(persyn, ["run", "pause", "test", "--reason", "the server\nis needed"])
    assert said.output == "run test is paused; 'persyn run resume test' continues it\n"
    working.join(timeout=60)
    assert not working.is_alive()

    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.PAUSED
        assert str(run.error).startswith("by ")
        assert str(run.error).endswith(": the server is needed")
        assert JobState.RUNNING not in set(session.scalars(select(Job.state)))
        stored = session.scalars(select(func.count(Response.id))).one()
    assert (
        4 <= stored == len(asked(journal)) < PROMPTS / 2
    )  # what was in flight is stored, and nothing was sent after it
    watched = CliRunner().invoke(persyn, ["run", "watch", "test"])
    assert watched.exit_code == EXIT_PAUSED
    assert "to continue: persyn run resume test" in watched.output
    with store.write() as session:  # only a person continues what a person has paused
        pipeline.start_run(session, run_file.read(file), actor="me")
        assert session.get_one(Run, run_id).state is RunState.PAUSED
        pipeline.resume(session, session.get_one(Run, run_id), actor="me")

    Worker(store, Settings.from_environment(where), run_id=run_id).run()
    with store.read() as session:
        assert session.get_one(Run, run_id).state is RunState.DONE
        assert session.scalars(select(func.count(Response.text))).one() == PROMPTS
        states = session.scalars(select(Event.to_state).where(Event.run_id == run_id, Event.job_id.is_(None))).all()
    assert len(asked(journal)) == len(set(asked(journal))) == PROMPTS  # nothing was asked twice
    assert [state for state in states if state == "paused"] == ["paused"]


def asked(journal: Path) -> list[tuple[str, str]]:
    if not journal.exists():
        return []
    return [tuple(json.loads(line)) for line in journal.read_text().splitlines() if line.endswith('"]')]


def test_no_job_of_a_paused_run_is_claimed(database: Database) -> None:
    with database.write() as session:
        one, other = make_run(session, name="one"), make_run(session, name="other")
        first, second = make_job(session, one.id), make_job(session, other.id)
        scheduling.pause(session, session.get_one(Run, one.id), actor="me")
        (backlog,) = workload.backlogs(session)
        assert (backlog.jobs, workload.due(session, "vllm.a", limit=9)) == (1, [second])
        claimed = queue.claim(session, owner="w")
        assert claimed is not None
        assert claimed.id == second
        assert queue.claim(session, owner="w") is None
        assert workload.is_drained(session)
        assert queue.turned(session, [claimed]) == set()
        scheduling.pause(session, session.get_one(Run, other.id), actor="me")
        assert queue.turned(session, [claimed]) == {second}
        assert queue.release_turned(session, claimed, owner="w")
        assert session.get_one(Job, second, populate_existing=True).attempts == 0
        pipeline.resume(session, session.get_one(Run, one.id), actor="me")
        again = queue.claim(session, owner="w")
        assert again is not None
        assert again.id == first


def test_only_a_running_run_is_paused(database: Database) -> None:
    with database.write() as session:
        run = session.get_one(Run, make_run(session).id)
        pipeline.finish(session, run, RunState.PAUSED, "me", "budget: used up")
        with pytest.raises(UsageError, match="run run is paused: budget: used up; only a running run can be paused"):
            scheduling.pause(session, run, actor="me")
        assert scheduling.how_to_continue(run).startswith("raise [budget]")
        run.state = RunState.DONE
        with pytest.raises(UsageError, match="run run is done; only a running run"):
            scheduling.pause(session, run, actor="me")


def test_jobs_of_the_run_with_the_highest_priority_are_claimed_first(database: Database) -> None:
    with database.write() as session:
        low, high = make_run(session, name="low"), make_run(session, name="high")
        first = make_job(session, low.id)
        urgent, held = make_job(session, high.id), make_job(session, high.id, priority=-5)
        assert queue.claim(session, owner="v") is not None
        scheduling.prioritise(session, session.get_one(Run, high.id), 7, actor="me")
        assert [job.priority for job in session.scalars(select(Job).order_by(Job.id))] == [0, -7, -7]
        order = [queue.claim(session, owner="w") for _ in range(2)]
        assert [job and job.id for job in order] == [urgent, first]
        assert held > urgent
        session.get_one(Run, high.id).stage = "generate"
        details = session.scalars(select(Event.detail).where(Event.run_id == high.id, Event.job_id.is_(None))).all()
        assert details == [{"priority": 7, "was": 0}]
        for value in (1001, "3", 0.5):
            with pytest.raises(UsageError, match="a priority is an integer from -1000 to 1000, got"):
                scheduling.prioritise(session, session.get_one(Run, high.id), value, actor="me")  # type: ignore[arg-type]


def test_a_priority_is_set_while_a_worker_saves_results(database: Database) -> None:
    with database.write() as session:
        run_id = make_run(session).id
        make_job(session, run_id)
        claimed = queue.claim(session, owner="w")
    assert claimed is not None

    def prioritise() -> None:
        with database.write() as session:
            scheduling.prioritise(session, session.get_one(Run, run_id), 3, actor="me")

    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:  # like a worker: the job before the run
            assert queue.hold(session, claimed)
            setting = pool.submit(prioritise)
            wait([setting], timeout=1)
            lookup.locked(session, run_id)  # in PostgreSQL, this would be a deadlock
        setting.result()
    with database.read() as session:
        assert session.scalars(select(Job.priority)).one() == -3


def test_a_run_whose_deletion_has_begun_is_not_cancelled(database: Database) -> None:
    with database.write() as session:
        run = session.get_one(Run, make_run(session).id)
        elsewhere = update(Run).values(state=RunState.DELETING).execution_options(synchronize_session=False)
        session.execute(elsewhere)
        assert run.state is RunState.RUNNING
        with pytest.raises(UsageError, match="run run is being deleted"):
            pipeline.cancel(session, run, actor="me")


def test_jobs_of_later_stages_have_the_priority_of_their_run(store: Database, tmp_path: Path) -> None:
    with store.write() as session:
        run = pipeline.start_run(session, run_file.read(write_run(tmp_path)), actor="me")
        scheduling.prioritise(session, run, -3, actor="me")
        for job in session.scalars(select(Job)):
            job.state = JobState.CANCELLED
        assert STAGES["calibrate"].plan(session, run)
        assert set(session.scalars(select(Job.priority).where(Job.state == JobState.QUEUED))) == {3}


def test_a_worker_prefers_the_queue_of_the_highest_priority_to_its_loaded_model() -> None:
    def backlog(name: str, priority: int, workers: int = 0) -> Backlog:
        return Backlog(name, gpus=0, jobs=2, prompts=8, workers=workers, priority=priority)

    waiting = [backlog("loaded", 0), backlog("urgent", -1), backlog("served", -2, workers=1), backlog("later", 5)]
    # Two jobs for one worker are not worth another load, however urgent.
    assert affinity.order(waiting, "loaded", Reach()) == ["urgent", "loaded", "later"]


def test_a_worker_claims_no_more_of_its_queue_while_more_urgent_jobs_wait(database: Database) -> None:
    with database.write() as session:
        low, high = make_run(session, name="low"), make_run(session, name="high")
        for run, name in ((low, "fake.a"), (low, "fake.a"), (high, "fake.b")):
            make_job(session, run.id, queue=name)
        ledger = Ledger(None)
        owner = ledger.enlist(lambda: True)
        claims = Claims(owner, Reach(), ledger, run_id=None, lease=queue.LEASE)
        claimed = claims.first(session, "fake.a", [])
        assert claimed is not None
        assert claimed.queue == "fake.a"
        scheduling.prioritise(session, session.get_one(Run, high.id), 1, actor="me")
        ledger._noted_at = float("-inf")  # it is time to look at the queues again
        assert claims.next(session, "fake.a", 0, 100) is None
        queue.release(session, claimed, owner=owner)
        following = claims.first(session, "fake.a", [])
        assert following is not None
        assert following.queue == "fake.b"


def test_a_worker_turns_to_more_urgent_jobs_that_others_cannot_do_soon(database: Database) -> None:
    with database.write() as session:
        low, high = make_run(session, name="low"), make_run(session, name="high")
        for run, name, jobs in ((low, "fake.a", 9), (high, "fake.b", 4)):
            for _ in range(jobs):
                make_job(session, run.id, queue=name, priority=-int(name == "fake.b"))
        assert queue.claim(session, owner="other", queue="fake.b") is not None
        ledger = Ledger(None)
        owner = ledger.enlist(lambda: True)
        claims = Claims(owner, Reach(), ledger, run_id=None, lease=queue.LEASE)
        assert queue.claim(session, owner=owner, queue="fake.a") is not None
        ledger._noted_at = float("-inf")  # it is time to look at the queues again
        assert claims.next(session, "fake.a", 0, 100) is None  # three jobs for one worker
        assert queue.claim(session, owner="other", queue="fake.b") is not None
        ledger._noted_at = float("-inf")
        assert claims.next(session, "fake.a", 0, 100) is not None  # two, which it will soon have started
