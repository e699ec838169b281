"""Glances and tallies of a run, computed from rows with fixed times."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.analysis import watch
from persyn.analysis.watch import Failures, JobErrors
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.db.time import now
from persyn.db.work import Event
from persyn.stages.batch import Progress
from tests.factories import make_assignment, make_job, make_response, make_run


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def glance(database: Database, run_id: int) -> watch.Snapshot:
    with database.read() as session:
        return watch.snapshot(session, session.get_one(Run, run_id))


def running(session: Session, run_id: int, **columns: object) -> int:
    lease = now(seconds(60))
    row = {"state": "running", "owner": "vm.1/417/9/ab", "lease_until": lease, "heartbeat_at": now(), **columns}
    return make_job(session, run_id, **row)


def test_a_worker_is_shown_with_what_it_holds_since_its_own_claim(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, stage="generate")
        # Claimed an hour ago by another worker, and 20 seconds ago by the present one.
        job = running(session, made.id, fence=2, teacher_id=made.teacher_ids[1], started_at=now(seconds(-3600)))
        session.add_all(
            Event(at=now(seconds(at)), actor="x", run_id=made.id, job_id=job, fence=fence, to_state=state)
            for at, fence, state in ((-3600, 1, "running"), (-1800, 1, "queued"), (-20, 2, "running"))
        )
        scoring = running(session, made.id, owner="vm.1/8/9/cd", queue="math.1", lease_until=now(seconds(-5)))
        make_job(session, make_run(session, name="another").id, state="queued")
    first, second = glance(database, made.id).held

    assert (first.worker, first.job, first.model, first.prompts) == ("vm.1/417/9/ab", job, "b", 9)
    assert first.seconds == pytest.approx(20, abs=5)
    assert first.lease_seconds == pytest.approx(60, abs=5)
    assert (second.job, second.model) == (scoring, "math.1")
    assert second.lease_seconds == pytest.approx(-5, abs=5)


def test_only_what_was_written_lately_for_this_run_and_stage_counts_as_pace(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, stage="generate", prompts=10)
        ada, bob = made.teacher_ids
        job = running(session, made.id, started_at=now(seconds(-600)))
        earlier = make_job(session, made.id, stage="calibrate", state="done")
        elsewhere = make_job(session, make_run(session, name="another").id, stage="generate", state="done")
        # 3 responses and 300 tokens within the last minute.
        for prompt_id in made.prompt_ids[:3]:
            make_response(session, prompt_id, ada, response_tokens=100, job_id=job, created_at=now(seconds(-30)))
        # Too old, of another stage, of another run, or imported.
        old = {"response_tokens": 100, "created_at": now(seconds(-90))}
        make_response(session, made.prompt_ids[4], ada, job_id=job, **old)
        make_response(session, made.prompt_ids[5], ada, response_tokens=100, job_id=earlier)
        make_response(session, made.prompt_ids[6], ada, response_tokens=100, job_id=elsewhere)
        make_response(session, made.prompt_ids[7], bob, response_tokens=100)
    (pace,) = glance(database, made.id).paces
    assert (pace.teacher, pace.responses, pace.tokens) == ("a", pytest.approx(3 / 60), pytest.approx(300 / 60))

    with database.write() as session:
        session.get_one(Run, made.id).state = RunState.DONE
    assert glance(database, made.id).paces == [], "who is done writes no more"


def test_a_stage_that_began_ten_seconds_ago_is_measured_over_ten_seconds(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, stage="generate")
        job = running(session, made.id, started_at=now(seconds(-10)))
        for prompt_id, teacher_id in zip(made.prompt_ids, reversed(made.teacher_ids), strict=False):
            make_response(session, prompt_id, teacher_id, response_tokens=50, job_id=job)
    seen = glance(database, made.id)
    assert [pace.teacher for pace in seen.paces] == ["a", "b"]
    assert seen.paces[0].tokens == pytest.approx(5, rel=0.3)
    assert seen.stage_seconds == pytest.approx(10, abs=3)


def test_of_very_many_responses_the_last_are_timed_by_when_they_came(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_MOST_RECENT", 4)
    with database.write() as session:
        made = make_run(session, stage="generate")
        job = running(session, made.id, started_at=now(seconds(-600)))
        for at, prompt_id in zip((-50, -40, -8, -6, -4, -2), made.prompt_ids, strict=False):
            make_response(
                session,
                prompt_id,
                made.teacher_ids[0],
                response_tokens=20,
                job_id=job,
                created_at=now(seconds(at)),
            )
    (pace,) = glance(database, made.id).paces
    assert pace.tokens == pytest.approx(4 * 20 / 8, rel=0.3)


def test_what_other_runs_write_meanwhile_does_not_slow_a_run(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_MOST_RECENT", 4)
    with database.write() as session:
        made, other = make_run(session, stage="generate"), make_run(session, name="another")
        job = running(session, made.id, started_at=now(seconds(-600)))
        for at, prompt_id in zip((-50, -40, -10, -8, -6), [made.prompt_ids[0], *other.prompt_ids], strict=False):
            make_response(session, prompt_id, made.teacher_ids[0], created_at=now(seconds(at)))
        make_response(session, made.prompt_ids[1], made.teacher_ids[0], job_id=job, created_at=now(seconds(-2)))
    (pace,) = glance(database, made.id).paces
    # One of the last four responses, which arrived within ten seconds, belongs to this run.
    assert pace.responses == pytest.approx(1 / 10, rel=0.3)


def test_jobs_rows_that_are_open_and_errors_are_of_the_present_stage(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, stage="generate")
        running(session, made.id, n_prompts=5, error="out of memory")
        make_job(session, made.id, n_prompts=7, error="out of memory")
        make_job(session, made.id, n_prompts=11)
        make_job(session, made.id, n_prompts=100, state="done")
        make_job(session, made.id, n_prompts=100, stage="calibrate", state="failed", error="other")
    seen = glance(database, made.id)
    assert seen.jobs == {"running": 1, "queued": 2, "done": 1}
    assert seen.open_rows == 5 + 7 + 11
    assert seen.troubles == [JobErrors("out of memory", 2)]


def test_a_tally_says_by_stage_why_rows_failed(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=6, calibration=1, holdout=1, stage="generate")
        ada, bob = made.teacher_ids
        grid, rest = made.prompt_ids[:2], made.prompt_ids[2:]
        scored = make_response(session, grid[0], ada)
        make_response(session, grid[0], bob, None, failure="too_long: 9,213 tokens, the model takes 8,192")
        make_response(session, grid[1], ada, None, failure="too_long: 8,200 tokens, the model takes 8,192")
        make_response(session, grid[1], bob, None, failure="refused")
        for prompt_id in rest:
            make_assignment(session, made.id, prompt_id, ada)
        make_response(session, rest[0], ada)
        make_response(session, rest[1], ada, None, failure="empty: nothing came")
        make_response(session, rest[2], bob, None, failure="not what was assigned")
        run = session.get_one(Run, made.id)
        session.add(Score(response_id=scored, scorer_id=run.quality_scorer_id, failure="timeout: 5 s", detail={}))
    with database.read() as session:
        run = session.scalars(select(Run)).one()
        found = watch.count_rows(session, run)
        less = watch.count_rows(session, run, known=["calibrate", "score"])

    assert found.stages["calibrate"] == Progress(total=4, done=1, failed=3)
    assert found.stages["generate"] == Progress(total=4, done=1, failed=1)
    assert found.failures == [
        Failures("calibrate", "too_long", 2),
        Failures("calibrate", "refused", 1),
        Failures("score", "timeout", 1),
        Failures("generate", "empty", 1),
    ]
    assert less.failures == [Failures("generate", "empty", 1)]
    assert less.after(found) == found


def test_where_no_teacher_writes_the_rate_is_that_of_the_whole_stage(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, stage="score")
        # Of 9 + 9 planned rows 4 are missing: 14 in 10 seconds.
        running(session, made.id, stage="score", started_at=now(seconds(-10)))
        make_job(session, made.id, stage="score", state="done", started_at=now(seconds(-8)))
    seen = glance(database, made.id)
    assert watch.rate(seen, pending=4) == pytest.approx(1.4, rel=0.3)
    assert watch.rate(seen, pending=18) is None


def test_rows_that_a_cancelled_job_left_are_not_counted_twice(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, stage="score")
        # Of 18 rows 9 were done in 10 seconds; the other 9 were taken from one job and planned again in the next.
        make_job(session, made.id, stage="score", state="done", started_at=now(seconds(-10)))
        make_job(session, made.id, stage="score", state="cancelled", started_at=now(seconds(-10)))
        running(session, made.id, stage="score", started_at=now(seconds(-1)))
    seen = glance(database, made.id)
    assert seen.planned_rows == 18
    assert watch.rate(seen, pending=9) == pytest.approx(0.9, rel=0.3)


@pytest.mark.parametrize(
    ("done", "open_then", "open_now", "over"),
    [
        (60, 40, 40, 60),
        # One of two jobs of 20 rows ended.
        (60, 40, 20, 80),
        # A job of 20 rows ended, 15 of which had been counted: 20 rows are missing, not 5.
        (75, 40, 20, 80),
        (75, 40, 0, 100),
        # 10 rows are in no job; a job may have progressed since.
        (60, 30, 0, 90),
        (60, 40, 60, 60),
    ],
)
def test_rows_of_jobs_that_ended_since_the_rows_were_counted_are_over(
    database: Database, done: int, open_then: int, open_now: int, over: int
) -> None:
    with database.write() as session:
        made = make_run(session, stage="generate")
        if open_now:
            running(session, made.id, n_prompts=open_now)
    counted = watch.RowCounts({"generate": Progress(100, done, 0)}, [], "generate", open_then)
    assert watch.finished_rows(glance(database, made.id), counted) == over
