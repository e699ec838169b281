"""Leases on jobs: which worker may work a job, and that a worker that lost its lease can change nothing."""

from __future__ import annotations

import threading
import uuid
from datetime import timedelta

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from persyn.db.connect import Database
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState
from persyn.jobs import queue, workload
from persyn.runs import pipeline
from tests.cluster import wait_for
from tests.factories import make_job, make_run
from tests.postgres import Postgres

GONE = timedelta(seconds=-1)


def add_jobs(database: Database, count: int = 1, **values: object) -> list[int]:
    """Queue jobs of a new run; return their ids in order."""
    with database.write() as session:
        run = make_run(session, name=f"run-{uuid.uuid4().hex}")
        return [make_job(session, run.id, **values) for _ in range(count)]


def claim(database: Database, owner: str = "a") -> queue.Claim | None:
    with database.write() as session:
        return queue.claim(session, owner=owner)


def states(database: Database) -> list[JobState]:
    with database.read() as session:
        return list(session.scalars(select(Job.state).order_by(Job.id)))


def expire(database: Database) -> None:
    """Expire every lease."""
    with database.write() as session:
        session.execute(update(Job).where(Job.state == JobState.RUNNING).values(lease_until=now(GONE)))


def sweep(database: Database, *, dead_owners: tuple[str, ...] = ()) -> int:
    with database.write() as session:
        return len(queue.sweep(session, actor="sweeper", dead_owners=dead_owners))


def test_a_claimed_job_is_running_under_a_lease(database: Database) -> None:
    (job_id,) = add_jobs(database)

    claimed = claim(database)

    assert claimed is not None
    assert (claimed.id, claimed.fence, claimed.attempts) == (job_id, 1, 1)
    with database.read() as session:
        job = session.get_one(Job, job_id)
        left = job.lease_until - job.heartbeat_at
        assert (job.state, job.owner) == (JobState.RUNNING, "a")
        assert timedelta(seconds=89) < left < timedelta(seconds=91)


def test_nothing_is_claimed_when_nothing_waits(database: Database) -> None:
    add_jobs(database)
    assert claim(database) is not None
    assert claim(database) is None


def test_lower_priority_numbers_come_first_then_older_jobs(database: Database) -> None:
    late, later = add_jobs(database, 2, priority=5)
    (urgent,) = add_jobs(database, priority=1)
    assert [claim(database).id for _ in range(3)] == [urgent, late, later]


def test_workers_that_claim_at_once_never_get_the_same_job(database: Database) -> None:
    ids = add_jobs(database, 60)
    taken: list[int] = []

    def work(name: str) -> None:
        while (job := claim(database, name)) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(taken) == ids


def test_a_held_job_can_be_extended_and_completed(database: Database) -> None:
    add_jobs(database)
    job = claim(database)
    with database.write() as session:
        assert queue.extend(session, {job.id: job.fence}) == set()
        assert queue.hold(session, job)
        assert queue.complete(session, job, owner="a")
    assert states(database) == [JobState.DONE]


def test_a_worker_whose_job_was_given_to_another_can_write_nothing(database: Database) -> None:
    add_jobs(database)
    zombie = claim(database, "slow")
    expire(database)
    assert sweep(database) == 1
    heir = claim(database, "fast")

    with database.write() as session:
        assert not queue.hold(session, zombie)
        assert not queue.complete(session, zombie, owner="slow")
        assert queue.fail(session, zombie, "late", owner="slow") is None
        assert not queue.release(session, zombie, owner="slow")
        assert queue.extend(session, {zombie.id: zombie.fence}) == {zombie.id}
        assert queue.hold(session, heir)


def test_a_live_lease_is_not_swept(database: Database) -> None:
    add_jobs(database)
    claim(database)
    assert sweep(database) == 0


def test_the_job_of_a_dead_owner_is_swept_at_once(database: Database) -> None:
    add_jobs(database, 2)
    claim(database, "dead")
    claim(database, "alive")
    assert sweep(database, dead_owners=("dead",)) == 1
    assert states(database) == [JobState.QUEUED, JobState.RUNNING]


def test_a_job_that_fails_too_often_ends_as_failed_with_its_last_error(database: Database) -> None:
    (job_id,) = add_jobs(database, max_attempts=2)
    for ending in (JobState.QUEUED, JobState.FAILED):
        with database.write() as session:
            session.execute(update(Job).values(not_before=None))
        job = claim(database)
        with database.write() as session:
            assert queue.fail(session, job, f"ended {ending}", owner="a") is ending
    with database.read() as session:
        assert session.get_one(Job, job_id).error == "ended failed"


def test_a_failed_attempt_waits_before_the_next(database: Database) -> None:
    add_jobs(database)
    job = claim(database)
    with database.write() as session:
        queue.fail(session, job, "no memory", owner="a")
    assert claim(database) is None  # not due yet
    with database.write() as session:
        assert workload.backlogs(session) == []
        assert not workload.is_drained(session)


def test_a_backlog_counts_what_is_due_and_who_works_on_it(database: Database) -> None:
    add_jobs(database, 4, gpus=1)
    for owner in ("a", "a", "b"):
        claim(database, owner)
    with database.read() as session:
        assert workload.backlogs(session) == [workload.Backlog("vllm.a", gpus=1, jobs=1, prompts=9, workers=2)]
        assert workload.backlogs(session, besides="b")[0].workers == 1


def test_a_claim_whose_answer_was_lost_is_given_back_by_its_owner(database: Database) -> None:
    add_jobs(database, 3)
    known, unknown = claim(database), claim(database)
    claim(database, "b")
    with database.write() as session:
        assert queue.release_unknown(session, owner="a", known=[known.id]) == 1
    assert states(database) == [JobState.RUNNING, JobState.QUEUED, JobState.RUNNING]
    again = claim(database)
    assert (again.id, again.attempts, again.fence) == (unknown.id, 1, 2)


def test_a_lost_job_whose_cancellation_was_asked_for_is_cancelled(database: Database) -> None:
    add_jobs(database)
    job = claim(database)
    with database.write() as session:
        assert queue.cancel(session, job.run_id, actor="me", job_ids=[job.id]) == 1
    expire(database)
    sweep(database)
    assert states(database) == [JobState.CANCELLED]


def test_lost_leases_use_up_attempts_so_that_nothing_loops_for_ever(database: Database) -> None:
    add_jobs(database, max_attempts=2)
    for _ in range(2):
        claim(database)
        expire(database)
        sweep(database)
    assert states(database) == [JobState.FAILED]


def test_a_killed_owner_uses_up_no_attempt(database: Database) -> None:
    add_jobs(database, max_attempts=2)
    for _ in range(4):
        claim(database, "dead")
        sweep(database, dead_owners=("dead",))
    assert states(database) == [JobState.QUEUED]


def test_a_job_that_advances_is_never_given_up(database: Database) -> None:
    add_jobs(database, max_attempts=2)
    for _ in range(5):
        job = claim(database)
        with database.write() as session:
            assert queue.hold(session, job)  # results were saved
        expire(database)
        sweep(database)
    assert states(database) == [JobState.QUEUED]


def test_giving_a_job_back_counts_no_attempt(database: Database) -> None:
    add_jobs(database)
    job = claim(database)
    with database.write() as session:
        assert queue.release(session, job, owner="a")
    again = claim(database)
    assert (again.attempts, again.fence) == (1, 2)


def test_cancelling_ends_waiting_jobs_and_stops_running_ones_at_their_next_write(database: Database) -> None:
    add_jobs(database, 2)
    job = claim(database)
    with database.write() as session:
        queue.cancel(session, job.run_id, actor="me")
    with database.write() as session:
        assert not queue.hold(session, job)
        assert queue.stop_cancelled(session, job, owner="a")
    assert states(database) == [JobState.CANCELLED, JobState.CANCELLED]


def test_a_job_that_is_claimed_while_a_run_is_cancelled_is_cancelled_too(postgres: Postgres) -> None:
    """Cancelling waits for a job that is being written; another job is claimed meanwhile."""
    database = Database(postgres.create(f"t{uuid.uuid4().hex}", template="migrated"))
    first, second = add_jobs(database, 2)
    held = claim(database, "a")
    assert held is not None
    with database.read() as session:
        run_id = session.get_one(Job, first).run_id
    cancelling = threading.Thread(target=lambda: cancel(database, run_id))
    with database.write() as session:
        queue.hold(session, held)
        cancelling.start()
        wait_for(lambda: is_waited_for(database), 10, "the cancelling waits")
        claimed = claim(database, "b")  # unless cancelling reached it first
    cancelling.join(10)
    with database.read() as session:
        one, other = (session.get_one(Job, job_id) for job_id in (first, second))
    assert one.cancel_requested
    assert other.cancel_requested if claimed else other.state is JobState.CANCELLED
    database.close()


def cancel(database: Database, run_id: int) -> None:
    with database.write() as session:
        queue.cancel(session, run_id, actor="me")


def is_waited_for(database: Database) -> bool:
    with database.read() as session:
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return bool(session.execute(waiting).scalar_one())


def test_two_jobs_of_a_run_that_end_together_do_not_wait_for_each_other(postgres: Postgres) -> None:
    database = Database(postgres.create(f"t{uuid.uuid4().hex}", template="migrated"))
    add_jobs(database, 3, stage="calibrate")
    claims = [claim(database, "a"), claim(database, "b")]
    both = threading.Barrier(2)
    failed: list[BaseException] = []

    def end(job: queue.Claim) -> None:
        try:
            with database.write() as session:
                queue.complete(session, job, owner="me")
                both.wait(10)  # both have written an event with a foreign key to the run
                pipeline.advance(session, job.run_id, actor="me")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=end, args=(job,)) for job in claims if job]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failed == []
    assert states(database) == [JobState.DONE, JobState.DONE, JobState.QUEUED]
    database.close()


def test_retrying_gives_failed_and_cancelled_jobs_all_their_attempts_again(database: Database) -> None:
    add_jobs(database, max_attempts=1)
    job = claim(database)
    with database.write() as session:
        queue.fail(session, job, "boom", owner="a")
        assert queue.retry(session, job.run_id, "generate", actor="me") == 1
    assert claim(database).attempts == 1


def test_what_failed_in_another_stage_than_the_one_retried_is_cancelled(database: Database) -> None:
    add_jobs(database, max_attempts=1)
    job = claim(database)
    with database.write() as session:
        queue.fail(session, job, "boom", owner="a")
        assert queue.retry(session, job.run_id, "calibrate", actor="me") == 0
    assert states(database) == [JobState.CANCELLED]


def test_a_running_job_without_a_lease_cannot_exist(database: Database) -> None:
    add_jobs(database)
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(update(Job).values(state=JobState.RUNNING))


def test_every_transition_leaves_an_event(database: Database) -> None:
    add_jobs(database)
    first = claim(database)
    with database.write() as session:
        queue.fail(session, first, "no memory", owner="a")
        session.execute(update(Job).values(not_before=None))
    second = claim(database, "b")
    with database.write() as session:
        queue.complete(session, second, owner="b")
    with database.read() as session:
        told = session.execute(select(Event.actor, Event.fence, Event.from_state, Event.to_state).order_by(Event.id))
        assert [tuple(row) for row in told] == [
            ("a", 1, "queued", "running"),
            ("a", 1, "running", "queued"),
            ("b", 2, "queued", "running"),
            ("b", 2, "running", "done"),
        ]


def test_an_event_that_cannot_be_written_undoes_its_transition(database: Database) -> None:
    add_jobs(database)

    def claim_and_die() -> None:
        with database.write() as session:
            queue.claim(session, owner="a")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        claim_and_die()
    assert states(database) == [JobState.QUEUED]
    with Session(database.engine) as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 0
