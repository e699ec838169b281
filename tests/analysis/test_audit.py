"""Each rule of the audit finds its violation, and a sound run has no findings."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from persyn.analysis import audit
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Router, Score
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState
from persyn.jobs import queue
from tests.factories import MadeRun, digest, make_assignment, make_response, make_run

GRID = 2


@pytest.fixture
def run(database: Database) -> MadeRun:
    """A finished run of four prompts: two in the grid, one failed response, a job that was released once."""
    with database.write() as session:
        run = make_run(session, prompts=4, calibration=GRID, stage="generate")
        router = Router(
            fingerprint=digest("router"),
            backbone="",
            tune="head",
            options={},
            teacher_ids=run.teacher_ids,
            metrics={},
            path="",
            sha256=digest(""),
        )
        session.add(router)
        session.flush()
        row = session.get_one(Run, run.id)
        row.router_id, row.state = router.id, RunState.DONE
        for teacher_id in run.teacher_ids:
            _write(session, run, "calibrate", teacher_id, run.prompt_ids[:GRID])
        scorers = row.quality_scorer_id, row.learnability_scorer_id
        for response_id in session.scalars(select(Response.id)).all():
            session.add_all(
                Score(response_id=response_id, scorer_id=scorer, value=1.0, n_tokens=1, detail={}) for scorer in scorers
            )
        first, second = run.teacher_ids
        for prompt_id, teacher_id in zip(run.prompt_ids, (first, first, first, second), strict=True):
            make_assignment(session, run.id, prompt_id, teacher_id)
        _write(session, run, "generate", first, run.prompt_ids[2:3])
        _write(session, run, "generate", second, run.prompt_ids[3:], failure="too_long")
    return run


def _write(
    session: Session, run: MadeRun, stage: str, teacher_id: int, prompt_ids: list[int], failure: str | None = None
) -> None:
    """Create a job that was claimed, released, claimed again and finished."""
    job = Job(
        run_id=run.id,
        stage=stage,
        queue="fake",
        teacher_id=teacher_id,
        first_prompt_id=prompt_ids[0],
        last_prompt_id=prompt_ids[-1],
        n_prompts=len(prompt_ids),
    )
    session.add(job)
    session.flush()
    for end in (queue.release, queue.complete):
        claim = queue.claim(session, owner="a")
        assert claim is not None
        end(session, claim, owner="a")
    for prompt_id in prompt_ids:
        make_response(session, prompt_id, teacher_id, None if failure else "Yes.", failure=failure, job_id=job.id)


@pytest.fixture
def audited(database: Database, run: MadeRun) -> Callable[[], list[tuple[str, str]]]:
    """The findings as (rule, about)."""

    def findings() -> list[tuple[str, str]]:
        with database.read() as session:
            found = audit.audit(session, session.get_one(Run, run.id))
            return [(finding.rule, finding.about) for finding in found]

    return findings


Audited = Callable[[], list[tuple[str, str]]]


def write(database: Database, *statements: Any) -> None:
    with database.write() as session:
        for statement in statements:
            session.execute(statement)


def last_job(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(Job.id).order_by(Job.id.desc()).limit(1)).one()


def events_of(database: Database, job_id: int) -> list[int]:
    """The ids of a job's events: queued > running > queued > running > done."""
    with database.read() as session:
        return list(session.scalars(select(Event.id).where(Event.job_id == job_id).order_by(Event.id)))


def without(database: Database, table: str, constraint: str, kind: str) -> None:
    """Drop a constraint, so that the violation it prevents can be created."""
    with database.engine.connect() as connection:
        if database.engine.dialect.name == "sqlite":
            # The table is recreated under another name; foreign keys and views must not follow it there.
            for pragma in ("foreign_keys=OFF", "legacy_alter_table=ON"):
                connection.connection.driver_connection.execute(f"PRAGMA {pragma}")  # type: ignore[union-attr]
        with connection.begin(), Operations(MigrationContext.configure(connection)).batch_alter_table(table) as batch:
            batch.drop_constraint(constraint, type_=kind)
    database.close()


def test_a_sound_run_has_no_findings(audited: Audited) -> None:
    assert audited() == []


def test_a_running_job_is_no_finding(database: Database, run: MadeRun, audited: Audited) -> None:
    with database.write() as session:
        session.execute(update(Run).values(state=RunState.RUNNING))
        session.execute(update(Job).where(Job.id == last_job(database)).values(state=JobState.FAILED))
        session.execute(
            update(Event).where(Event.id == events_of(database, last_job(database))[-1]).values(to_state="failed")
        )
        assert queue.retry(session, run.id, "generate", actor="me") == 1
        assert queue.claim(session, owner="b") is not None
    assert audited() == []


def test_a_stage_that_is_over_and_lacks_a_row(database: Database, audited: Audited) -> None:
    write(database, delete(Score).where(Score.response_id == select(Score.response_id).limit(1).scalar_subquery()))
    assert audited() == [("counts", "stage score")]


def test_a_stage_that_has_other_rows_than_it_was_given(database: Database, run: MadeRun, audited: Audited) -> None:
    with database.write() as session:
        stranger = make_run(session, name="other", prompts=1)
        make_assignment(session, run.id, stranger.prompt_ids[0], run.teacher_ids[0])
        make_response(session, stranger.prompt_ids[0], run.teacher_ids[0])
    assert audited() == [("counts", "stage assign"), ("counts", "stage generate")]


def test_an_assignment_that_is_not_there(database: Database, run: MadeRun, audited: Audited) -> None:
    write(database, delete(Assignment).where(Assignment.prompt_id == run.prompt_ids[3]))
    assert audited() == [("counts", "stage assign"), ("counts", "stage generate")]


def test_an_assignment_without_a_response(database: Database, run: MadeRun, audited: Audited) -> None:
    write(database, delete(Response).where(Response.prompt_id == run.prompt_ids[3]))
    assert audited() == [("counts", "stage generate"), ("response", f"prompt {run.prompt_ids[3]}")]


def test_an_open_job_of_a_run_that_is_done(database: Database, run: MadeRun, audited: Audited) -> None:
    with database.write() as session:
        job = Job(run_id=run.id, stage="generate", queue="fake", first_prompt_id=1, last_prompt_id=1, n_prompts=1)
        session.add(job)
    assert audited() == [("response", f"job {last_job(database)}")]


def test_two_responses_of_a_teacher_to_a_prompt(database: Database, run: MadeRun, audited: Audited) -> None:
    without(database, "responses", "uq_responses_prompt_id_teacher_id_sample", "unique")
    with database.write() as session:
        make_response(session, run.prompt_ids[3], run.teacher_ids[1])
    found = audited()
    assert ("duplicate", f"prompt {run.prompt_ids[3]}") in found
    assert {rule for rule, _ in found} == {"duplicate", "counts"}


@pytest.mark.parametrize("column", ["teacher_id", "prompt_id"])
def test_a_response_that_was_not_its_jobs_to_write(
    database: Database, run: MadeRun, audited: Audited, column: str
) -> None:
    other = {"teacher_id": run.teacher_ids[0], "prompt_id": run.prompt_ids[0]}[column]
    jobs = select(Job.id).where(getattr(Job, column if column == "teacher_id" else "first_prompt_id") == other)
    mine = Response.prompt_id == run.prompt_ids[3]
    write(database, update(Response).where(mine).values(job_id=jobs.order_by(Job.id).limit(1).scalar_subquery()))
    assert audited() == [("stray", f"prompt {run.prompt_ids[3]}")]


def test_a_job_under_a_lease_that_does_not_run(database: Database, audited: Audited) -> None:
    job_id = last_job(database)
    write(database, update(Job).where(Job.id == job_id).values(lease_until=now(timedelta(minutes=1))))
    assert audited() == [("lease", f"job {job_id}")]


def test_a_running_job_without_a_lease(database: Database, run: MadeRun, audited: Audited) -> None:
    job_id = last_job(database)
    without(database, "jobs", "ck_jobs_running_under_lease", "check")
    write(
        database,
        update(Run).values(state=RunState.RUNNING),
        update(Event).where(Event.id == events_of(database, job_id)[-1]).values(to_state="running", fence=3),
        update(Event).where(Event.id == events_of(database, job_id)[-2]).values(to_state="queued"),
        update(Job).where(Job.id == job_id).values(state=JobState.RUNNING),
    )
    assert ("lease", f"job {job_id}") in audited()


@pytest.mark.parametrize("number", range(4))
def test_an_event_that_is_missing(database: Database, audited: Audited, number: int) -> None:
    job_id = last_job(database)
    write(database, delete(Event).where(Event.id == events_of(database, job_id)[number]))
    assert ("events", f"job {job_id}") in audited()


def test_a_job_in_another_state_than_its_last_event_says(database: Database, audited: Audited) -> None:
    job_id = last_job(database)
    write(database, update(Job).where(Job.id == job_id).values(state=JobState.CANCELLED))
    assert audited() == [("events", f"job {job_id}")]


def test_a_job_that_ended_without_an_event(database: Database, audited: Audited) -> None:
    job_id = last_job(database)
    write(database, delete(Event).where(Event.job_id == job_id))
    assert audited() == [("events", f"job {job_id}"), ("fence", f"job {job_id}")]


def test_a_fence_that_falls(database: Database, audited: Audited) -> None:
    job_id = last_job(database)
    write(database, update(Event).where(Event.id == events_of(database, job_id)[1]).values(fence=9))
    assert audited() == [("fence", f"job {job_id}")]


def test_two_claims_under_one_fence(database: Database, audited: Audited) -> None:
    job_id = last_job(database)
    _, _, second, done = events_of(database, job_id)
    write(
        database,
        update(Event).where(Event.id.in_((second, done))).values(fence=1),
        update(Job).where(Job.id == job_id).values(fence=1),
    )
    assert audited() == [("fence", f"job {job_id}")]


def test_a_fence_that_no_event_raised(database: Database, audited: Audited) -> None:
    job_id = last_job(database)
    write(database, update(Job).where(Job.id == job_id).values(fence=7))
    assert audited() == [("fence", f"job {job_id}")]


def test_another_runs_faults_are_not_this_ones(database: Database, audited: Audited) -> None:
    with database.write() as session:
        other = make_run(session, name="other", prompts=1)
        columns = {"run_id": other.id, "stage": "generate", "queue": "x", "first_prompt_id": 1, "last_prompt_id": 1}
        session.execute(insert(Job).values(**columns, n_prompts=1, state=JobState.DONE, fence=4))
    assert audited() == []
