"""A teacher that becomes worse is stopped, nothing is lost or asked twice, and it can be asked again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import func, select, update

from persyn.analysis import second_choices, trace
from persyn.cli.summary import show
from persyn.db import notes
from persyn.db.catalog import Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Chart, ChartPoint, Response, Score
from persyn.db.work import Job, JobState
from persyn.jobs import queue
from persyn.report import document, figures, gather
from persyn.runs import pipeline
from persyn.stages import drift, verdict
from tests.factories import MadeRun, make_assignment, make_response, make_run
from tests.one_database import SQLITE
from tests.stages.test_fallback import Interrupted, Jobs, interrupted, left
from tests.web.conftest import client

CALIBRATION, TARGETS = 50, 160


def make(database: Database, *, when_worse: str | None = "stop", teachers: str = "ab", **more: Any) -> MadeRun:
    """A run whose prompts are assigned to a and b by turns; four of five calibration responses are right."""
    with database.write() as session:
        made = make_run(
            session, teachers=tuple(teachers), prompts=CALIBRATION + TARGETS, calibration=CALIBRATION, stage="generate"
        )
        run = session.get_one(Run, made.id)
        generation = {"check": True} | ({} if when_worse is None else {"when_worse": when_worse})
        own = {**run.config["run"], "job_prompts": 8, "alpha": 0.0}
        run.learnability_scorer_id = None
        run.config = {**run.config, "strategy": {"kind": "car"}, "run": own, "generation": generation, **more}
        for place, prompt_id in enumerate(made.prompt_ids):
            if place < CALIBRATION:
                for teacher_id in made.teacher_ids:
                    response_id = make_response(session, prompt_id, teacher_id, "right")
                    session.add(
                        Score(
                            response_id=response_id,
                            scorer_id=run.quality_scorer_id,
                            value=float(place % 5 > 0),
                            detail={},
                        )
                    )
            one = made.teacher_ids[(place + 1) % 2]
            others = [each for each in made.teacher_ids if each != one]
            make_assignment(session, made.id, prompt_id, one, score=2.0, further=others if "fallback" in more else None)
        return made


def falling(after: int, *, teachers: str = "a") -> Callable[[str, int], str]:
    """Teachers that are wrong from some response on; the others, and they before, are right on four of five."""
    said: dict[str, int] = {}

    def reply(name: str, prompt: int) -> str:
        said[name] = said.get(name, 0) + 1
        return "wrong" if (name in teachers and said[name] > after) or prompt % 5 == 0 else "right"

    return reply


class Checked(Jobs):
    """Scores responses before it asks for more, as another worker would."""

    def one(self) -> bool:
        with self.database.write() as session:
            session.execute(update(Job).where(Job.scorer_id.is_not(None)).values(priority=-1))
        return super().one()


def jobs_of(database: Database, made: MadeRun, reply: Callable[[str, int], str]) -> Jobs:
    return Checked(database, made, reply, judge=lambda text: float(text == "right"))


def state(database: Database, made: MadeRun) -> tuple[RunState, str | None]:
    with database.read() as session:
        run = session.get_one(Run, made.id)
        return run.state, run.error


def require_whole(database: Database, made: MadeRun, jobs: Jobs) -> None:
    """Each target was asked once by each teacher that has a response to it, and each response was scored once."""
    assert len(jobs.asked) == len(set(jobs.asked))
    assert len(jobs.judged) == len(set(jobs.judged)) == len(jobs.asked)
    with database.read() as session:
        answered = (
            select(func.count())
            .select_from(Assignment)
            .join(
                Response, (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id)
            )
        )
        assert session.scalars(answered.where(Response.text.is_not(None))).one() == CALIBRATION + TARGETS


def test_a_teacher_that_becomes_worse_is_stopped_until_the_run_is_resumed(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(database)
    jobs = jobs_of(database, made, falling(after=16))
    jobs.plan()
    jobs.rest()

    found, error = state(database, made)
    assert found is RunState.FAILED
    assert error is not None
    # 16 of its 80 responses are as predicted; the next 40, in five jobs, are not
    assert error.startswith("stage generate: drift: teacher a became worse: the mean quality of its last 4")
    assert "50 calibration responses predicted 0.800, at least 0.668; 24 of its responses are missing" in error
    assert error.endswith("'persyn run resume run' asks for the rest")
    assert [teacher for teacher, _ in jobs.asked].count("a") == 56
    assert [teacher for teacher, _ in jobs.asked].count("b") == 80
    with database.read() as session:
        run = session.get_one(Run, made.id)
        assert notes.noted(session, run, drift.DRIFT)[0]["teacher"] == "a"
        halted = session.scalars(select(Job.error).where(Job.state == JobState.CANCELLED)).all()
        assert len(halted) == 3
        assert all(each is not None and each.startswith("drift: teacher a became worse") for each in halted)
        show(session, run)
        report = gather.gather(session, run)
    assert "control-charts" in figures.drawable(report)
    status = capsys.readouterr().out
    assert "teacher a became worse: the mean quality" in status
    assert "Teacher a became worse" in document.markdown(report, [])
    assert "teacher a became worse: the mean quality" in client(database).get("/runs/run").text

    jobs.reply = falling(after=1000)
    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, made.id), actor="me")
    jobs.all()

    require_whole(database, made, jobs)
    with database.read() as session:
        run = session.get_one(Run, made.id)
        assert drift.alarms(session, run) == []
        assert session.scalars(select(func.count()).select_from(Chart)).one() == 3  # another one of a
        assert session.scalars(select(func.count()).select_from(ChartPoint)).one() == 7 + 10 + 3
        assert notes.noted(session, run, "asked again") == [["a"]]


def test_its_remaining_prompts_go_to_their_next_choice(database: Database) -> None:
    made = make(database, fallback={"on": ["failed"]})
    jobs = jobs_of(database, made, falling(after=16))
    jobs.all()

    require_whole(database, made, jobs)
    assert [teacher for teacher, _ in jobs.asked].count("a") == 56
    moved = left(database, made)
    assert moved == [(1, "a", "drift", "not_asked: the teacher became worse, and was stopped before")] * 24
    with database.read() as session:
        run = session.get_one(Run, made.id)
        prompt_id = session.scalars(select(Assignment.prompt_id).where(Assignment.choice == 2).limit(1)).one()
        assert trace.trace(session, run, prompt_id).assignment["reason"] == "fallback: drift"
        assert second_choices.sentences(session, run) == [
            "24 prompts left a teacher that became worse before it was asked (a 24)"
        ]
        # What came of other choices says nothing about a first one.
        on_chart = select(func.max(ChartPoint.responses)).join(Chart).join(Teacher, Teacher.id == Chart.teacher_id)
        assert session.scalars(on_chart.where(Teacher.name == "b")).one() == 80


@SQLITE
def test_a_stopped_teacher_is_nobodys_next_choice(database: Database) -> None:
    made = make(database, teachers="abc", fallback={"attempts": 1})
    jobs = jobs_of(database, made, falling(after=16, teachers="ab"))
    jobs.all()

    require_whole(database, made, jobs)
    asked = [teacher for teacher, _ in jobs.asked]
    assert [asked.count(teacher) for teacher in "abc"] == [56, 56, 48]


@SQLITE
def test_where_nobody_else_is_left_the_teacher_is_waited_for(database: Database) -> None:
    made = make(database, fallback={"on": ["failed"]})
    with database.write() as session:
        for each in session.scalars(select(Assignment)):
            each.further = []
    jobs = jobs_of(database, made, falling(after=16))
    jobs.plan()
    jobs.rest()
    assert "24 of its responses are missing" in (state(database, made)[1] or "")

    jobs.reply = falling(after=1000)
    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, made.id), actor="me")
    jobs.all()

    require_whole(database, made, jobs)


@SQLITE
@pytest.mark.parametrize(("when_worse", "alarms", "charts"), [("report", 1, 2), (None, 0, 0)])
def test_a_run_that_is_not_to_stop_goes_on(
    database: Database, when_worse: str | None, alarms: int, charts: int
) -> None:
    made = make(database, when_worse=when_worse)
    jobs = jobs_of(database, made, falling(after=16))
    jobs.all()

    require_whole(database, made, jobs)
    with database.read() as session:
        run = session.get_one(Run, made.id)
        assert len(drift.alarms(session, run)) == len(notes.noted(session, run, drift.DRIFT)) == alarms
        assert session.scalars(select(func.count()).select_from(Chart)).one() == charts


def test_jobs_spread_over_a_teachers_prompts(database: Database) -> None:
    made = make(database)
    jobs_of(database, made, falling(after=16)).plan()

    with database.read() as session:
        mine = select(Job.first_prompt_id).where(Job.teacher_id == made.teacher_ids[0]).order_by(Job.id)
        starts = session.scalars(mine).all()
    # the fractions of 0 to 9 times 0.618 are 0, .618, .236, .854, .472, .090, .708, .326, .944, .562
    assert [sorted(starts).index(start) for start in starts] == [0, 5, 2, 7, 4, 9, 1, 6, 3, 8]


@SQLITE
def test_more_workers_do_not_ask_a_stopped_teacher_again(database: Database) -> None:
    made = make(database)
    jobs = jobs_of(database, made, falling(after=16))
    jobs.plan()
    while sum(teacher == "a" for teacher, _ in jobs.asked) < 48 or not _alarmed(database, made):
        assert jobs.one()
    with database.write() as session:
        run = session.get_one(Run, made.id)
        assert run.state is RunState.RUNNING
        pipeline.resume(session, run, actor="another worker")
        halted = select(func.count()).where(Job.state == JobState.CANCELLED, Job.error.startswith("drift: "))
        assert session.scalars(halted).one() == 3
    jobs.rest()

    assert state(database, made)[0] is RunState.FAILED
    assert sum(teacher == "a" for teacher, _ in jobs.asked) == 56


@SQLITE
def test_a_job_that_a_lost_worker_held_asks_a_stopped_teacher_nothing(database: Database) -> None:
    made = make(database)
    jobs = jobs_of(database, made, falling(after=16))
    jobs.plan()
    with database.write() as session:  # the last one of a
        last = session.scalars(select(Job).where(Job.teacher_id == made.teacher_ids[0]).order_by(Job.id.desc())).first()
        assert last is not None
        last.priority = -2
        session.flush()
        assert queue.claim(session, owner="lost", run_id=made.id) is not None
    jobs.rest()
    assert state(database, made)[0] is RunState.RUNNING
    with database.write() as session:
        queue.sweep(session, actor="me", dead_owners=["lost"])
    jobs.rest()

    found, error = state(database, made)
    assert found is RunState.FAILED
    assert "24 of its responses are missing" in (error or "")


@SQLITE
@pytest.mark.parametrize("statement", ["INSERT INTO chart_points", "INSERT INTO events"])
def test_an_alarm_that_is_interrupted_is_raised_again(database: Database, statement: str) -> None:
    made = make(database)
    jobs = jobs_of(database, made, falling(after=0))
    jobs.plan()
    with database.write() as session:
        scored = select(func.count()).select_from(ChartPoint)
        assert session.scalars(scored).one() == 0
    interruptions = 0
    while state(database, made)[0] is RunState.RUNNING and interruptions < 30:
        try:
            with interrupted(database, statement) if interruptions % 2 else nullcontext():
                if not jobs.one():
                    break
        except Interrupted:
            with database.write() as session:
                queue.sweep(session, actor="me", dead_owners=["me"])
        interruptions += 1
    jobs.rest()

    assert state(database, made)[0] is RunState.FAILED
    with database.read() as session:
        run = session.get_one(Run, made.id)
        assert [each.teacher for each in drift.stopped(session, run)] == ["a"]
        assert len(notes.noted(session, run, drift.DRIFT)) == 1
        points = select(ChartPoint.responses).join(Chart).where(Chart.teacher_id == made.teacher_ids[0])
        assert session.scalars(points.order_by(ChartPoint.id)).all() == [8, 16, 24, 32, 40]


def _alarmed(database: Database, made: MadeRun) -> bool:
    with database.read() as session:
        return bool(drift.alarms(session, session.get_one(Run, made.id)))


def test_another_router_begins_with_other_charts_except_of_a_stopped_teacher(database: Database) -> None:
    made = make(database)
    jobs = jobs_of(database, made, falling(after=16))
    jobs.plan()
    jobs.rest()
    with database.write() as session:
        notes.note(session, session.get_one(Run, made.id), {verdict.RECALIBRATED: {}}, actor="me")
    for _ in range(2):
        with database.write() as session:
            run = session.get_one(Run, made.id)
            drift.begin(session, run)
            charts = session.execute(select(Teacher.name, func.count()).join(Chart).group_by(Teacher.name)).all()
            assert sorted(map(tuple, charts)) == [("a", 1), ("b", 2)]
            assert [each.teacher for each in drift.stopped(session, run)] == ["a"]
