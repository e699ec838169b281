"""What a run's summary says of its workers, from events with times set by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from persyn import summary
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.work import Event, Load
from tests.factories import make_assignment, make_job, make_response, make_run

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
                # Two jobs at once from 2 to 10, one more until 12: ten seconds of work.
                event(2, "ada", run_id, first, "running"),
                event(4, "ada", run_id, second, "running"),
                event(10, "ada", run_id, first, "done"),
                event(12, "ada", run_id, second, "queued"),
                # Idle until 17; taken back at 47, of which it was silent for 20: ten seconds more.
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
    """Ten tokens of a's and what b has in the grid, for four prompts."""
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
