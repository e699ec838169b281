"""The worker figures of a run's summary, computed from events with fixed times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from persyn.analysis import summary
from persyn.cli.summary import show
from persyn.db.catalog import Run, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Origin, Score
from persyn.db.work import Event, Load
from persyn.report import document
from persyn.report.gather import gather
from tests.factories import make_assignment, make_job, make_response, make_router, make_run

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def event(at: float, actor: str, run_id: int, job_id: int | None, to_state: str, **detail: Any) -> Event:
    when = NOON + timedelta(seconds=at)
    return Event(at=when, actor=actor, run_id=run_id, job_id=job_id, to_state=to_state, detail=detail)


def test_a_workers_time_is_work_while_it_has_a_job_and_was_heard_of(database: Database) -> None:
    with database.write() as session:
        run_id = make_run(session).id
        first, second = make_job(session, run_id), make_job(session, run_id)
        session.add_all(
            [
                event(0, "cli", run_id, None, "running"),
                # Two jobs at once from 2 to 10, one of them until 12: ten seconds of work.
                event(2, "ada", run_id, first, "running"),
                event(4, "ada", run_id, second, "running"),
                event(10, "ada", run_id, first, "done"),
                event(12, "ada", run_id, second, "queued"),
                # Idle until 17; taken back at 47 after 20 seconds of silence: ten more seconds.
                event(17, "ada", run_id, second, "running"),
                event(47, "dispatcher", run_id, second, "queued", silent_seconds=20.0),
                event(50, "bob", run_id, second, "running"),
                event(53, "bob", run_id, second, "done"),
                Load(run_id=run_id, job_id=first, owner="ada", engine="fake", seconds=1.5, log="1.log"),
                Load(run_id=run_id, job_id=second, owner="ada", engine="fake", seconds=2.0, log="2.log"),
            ]
        )
    with database.read() as session:
        ada, bob = summary.facts(session, session.get_one(Run, run_id)).workers

    assert (ada.worker, ada.claims, ada.loads, ada.load_seconds) == ("ada", 3, 2, 3.5)
    assert (ada.work_seconds, ada.idle_seconds) == pytest.approx((20.0, 5.0))
    assert (bob.worker, bob.claims, bob.loads) == ("bob", 1, 0)
    assert (bob.work_seconds, bob.idle_seconds) == pytest.approx((3.0, 0.0))


def test_a_stages_work_is_told_apart_from_the_time_that_went_by(database: Database) -> None:
    with database.write() as session:
        run_id = make_run(session, stage="score").id
        began, ended = NOON, NOON + timedelta(seconds=100)
        grid = make_job(session, run_id, stage="calibrate", started_at=began, finished_at=ended)
        score = make_job(session, run_id, stage="score", started_at=began, finished_at=began + timedelta(seconds=6))
        session.add_all(
            [
                # Ada works on the grid for five seconds, the run pauses, and bob finishes it in ten more.
                event(0, "ada", run_id, grid, "running"),
                event(0, "cid", run_id, score, "running"),
                event(5, "ada", run_id, grid, "queued"),
                event(6, "cid", run_id, score, "done"),
                event(90, "bob", run_id, grid, "running"),
                event(100, "bob", run_id, grid, "done"),
            ]
        )
    with database.read() as session:
        stages = {stage.stage: stage for stage in summary.facts(session, session.get_one(Run, run_id)).stages}

    assert (stages["calibrate"].seconds, stages["calibrate"].work_seconds) == pytest.approx((100.0, 15.0))
    assert (stages["score"].seconds, stages["score"].work_seconds) == pytest.approx((6.0, 6.0))


def test_tokens_are_this_runs_own_and_what_it_found_in_the_store_is_told_apart(database: Database) -> None:
    with database.write() as session:
        first = make_run(session, name="first", prompts=3, calibration=3)
        second = make_run(session, name="second")
        a, b = first.teacher_ids
        mine, theirs = make_job(session, first.id), make_job(session, second.id)
        session.execute(update(Teacher).values(price_in=0.0, price_out=1_000_000.0))
        make_response(session, first.prompt_ids[0], a, response_tokens=10, prompt_tokens=1, job_id=mine)
        make_response(session, first.prompt_ids[1], a, response_tokens=20, prompt_tokens=1, job_id=theirs)
        make_response(session, first.prompt_ids[2], a, response_tokens=40, prompt_tokens=1, origin=Origin.IMPORTED)
        make_response(session, first.prompt_ids[0], b, response_tokens=80, prompt_tokens=1, job_id=theirs)
    with database.read() as session:
        found = summary.facts(session, session.get_one(Run, first.id))

    assert [(t.tokens, t.reused_tokens, t.cost) for t in found.teachers] == [(10, 60, 10.0), (0, 80, 0.0)]
    assert (found.tokens, found.reused_tokens, found.cost) == (10, 140, 10.0)


@pytest.mark.parametrize(("to_one", "said"), [(91, "a"), (89, None)])
def test_a_router_that_gives_nearly_all_to_one_teacher_is_named(
    database: Database, to_one: int, said: str | None
) -> None:
    with database.write() as session:
        made = make_run(session, prompts=110)
        for number, prompt_id in enumerate(made.prompt_ids):
            routed = number < 100
            teacher_id = made.teacher_ids[0 if routed and number < to_one else 1]
            make_assignment(session, made.id, prompt_id, teacher_id, reason="router" if routed else "calibration")
    with database.read() as session:
        assert summary.facts(session, session.get_one(Run, made.id)).collapsed == said


def test_what_limits_gave_to_another_teacher_counts_among_the_routed_prompts(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=110)
        for number, prompt_id in enumerate(made.prompt_ids):
            # The router would give 50 prompts to b, but the budget does not suffice for any.
            reason = "router: head" if number < 60 else "limits: router: head"
            make_assignment(session, made.id, prompt_id, made.teacher_ids[0], reason=reason)
    with database.read() as session:
        assert summary.facts(session, session.get_one(Run, made.id)).collapsed is None

    with database.write() as session:
        session.execute(update(Assignment).values(reason="router: head"))
    with database.read() as session:
        assert summary.facts(session, session.get_one(Run, made.id)).collapsed == "a"


@pytest.mark.parametrize(("hit1", "said"), [(1.0, None), (0.9, "a")])
def test_a_router_that_is_right_about_one_teacher_is_not_called_collapsed(
    database: Database, hit1: float, said: str | None
) -> None:
    with database.write() as session:
        made = make_run(session, prompts=60)
        for prompt_id in made.prompt_ids:
            make_assignment(session, made.id, prompt_id, made.teacher_ids[0], reason="router")
        router = make_router(session, made, metrics={"router": {"hit1": hit1}})
        session.get_one(Run, made.id).router_id = router
    with database.read() as session:
        assert summary.facts(session, session.get_one(Run, made.id)).collapsed == said


@pytest.mark.parametrize(
    ("of_b", "expected"),
    [
        pytest.param(None, None, id="has not answered yet"),
        pytest.param({"response_tokens": None}, None, id="was imported without counts"),
        pytest.param({"text": None, "failure": "refused"}, 40, id="failed, and would have written nothing"),
        pytest.param({"response_tokens": 5}, 60, id="wrote"),
    ],
)
def test_what_all_teachers_would_have_written_is_known_of_all_or_not_at_all(
    database: Database, of_b: dict[str, Any] | None, expected: int | None
) -> None:
    """Four prompts times a's ten tokens and b's mean on the grid."""
    with database.write() as session:
        made = make_run(session, prompts=4, calibration=1)
        a, b = made.teacher_ids
        make_response(session, made.prompt_ids[0], a, response_tokens=10)
        if of_b is not None:
            make_response(session, made.prompt_ids[0], b, **of_b)
    with database.read() as session:
        assert summary.facts(session, session.get_one(Run, made.id)).tokens_generate_all == expected


@pytest.mark.parametrize(
    ("amount", "said"), [(0.0, "$0.00"), (0.00321, "$0.0032"), (0.05, "$0.05"), (0.5, "$0.50"), (1234.5, "$1,234.50")]
)
def test_small_amounts_of_money_are_not_rounded_away(amount: float, said: str) -> None:
    assert summary.dollars(amount) == said


def test_how_long_a_teacher_reasons_and_how_often_it_does_not_finish(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four responses of a, two reason with 6 and 9 tokens, one does not, and one never comes to an answer."""
    with database.write() as session:
        made = make_run(session, prompts=5)
        a, b = made.teacher_ids
        for prompt_id, reasoning in zip(made.prompt_ids, (6, 9, None, 64), strict=False):
            make_assignment(session, made.id, prompt_id, a)
            answer = {"failure": "unfinished_reasoning: 64 tokens"} if reasoning == 64 else {"response_tokens": 10}
            text = None if reasoning == 64 else "Yes."
            make_response(session, prompt_id, a, text, reasoning="Hm.", reasoning_tokens=reasoning, **answer)
        make_assignment(session, made.id, made.prompt_ids[4], b)
        make_response(session, made.prompt_ids[4], b, response_tokens=10)
    with database.read() as session:
        run = session.get_one(Run, made.id)
        found = summary.facts(session, run)
        show(session, run)
        report = document.markdown(gather(session, run), []).replace("\\", "")

    of_a, of_b = found.teachers
    assert (of_a.reasoning_tokens, of_a.reasoning_share, of_a.unfinished) == (7.5, 0.5, 1)
    assert (of_b.reasoning_tokens, of_b.reasoning_share, of_b.unfinished) == (None, None, 0)
    said = capsys.readouterr().out
    assert next(line.split() for line in said.splitlines() if line.startswith("a "))[-2:] == ["8", "50%"]
    assert "ended inside their reasoning, without an answer: a 1; a larger max_tokens leaves room for it" in said
    assert "- Responses ended inside their reasoning, without an answer, by teacher: a 1." in report
    assert repr(found).splitlines()[-3].split()[-1] == "reasoning"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_cut_off_or_known_to_be_wrong_is_said_where_one_looks(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with database.write() as session:
        made = make_run(session, prompts=8)
        stored = session.get_one(Run, made.id)
        stored.config = {**stored.config, "quality": {**stored.config["quality"], "kind": "math"}}
        a, b = made.teacher_ids
        for number, prompt_id in enumerate(made.prompt_ids):
            make_assignment(session, made.id, prompt_id, a if number < 4 else b)
            of_a = {"finish_reason": "length" if number == 0 else "stop"}
            response_id = make_response(session, prompt_id, a if number < 4 else b, **(of_a if number < 4 else {}))
            if number < 3:
                value = {"value": float(number > 0), "detail": {}}
                session.add(Score(response_id=response_id, scorer_id=stored.quality_scorer_id, **value))
    with database.read() as session:
        run = session.get_one(Run, made.id)
        found = summary.facts(session, run)
        show(session, run)
        report = document.markdown(gather(session, run), []).replace("\\", "")

    assert [(teacher.teacher, teacher.truncated) for teacher in found.teachers] == [("a", 0.25), ("b", 0.0)]
    assert found.wrong == 1
    said = capsys.readouterr().out
    assert next(line.split() for line in said.splitlines() if line.startswith("a "))[-1] == "25%"
    assert (
        "of the responses of a more than 5% are cut off at max_tokens; 'persyn export run --finish-reason stop'" in said
    )
    assert "1 of the assigned responses are known to be wrong; 'persyn export run --drop-wrong' leaves them out" in said
    assert "- Responses were cut off at max_tokens, by teacher: a 25.0%." in report
    assert "- 1 of the assigned responses are known to be wrong" in report
