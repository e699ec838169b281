"""What requests cost is held before they are sent and counted once, whatever becomes of their worker."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from msgspec import convert
from msgspec.structs import replace
from sqlalchemy import update
from sqlalchemy.orm import Session

from persyn.config import BudgetTable, load_config
from persyn.db import batches
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.spending import Place, Price, PriceKind
from persyn.db.time import now
from persyn.db.work import Job, JobState
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Amount, Bill, Tariff
from persyn.jobs.queue import Claim
from persyn.llm.rates import Usage
from tests.factories import make_job, make_run, make_scorer

#: 100 x $1 + 90 x $10 per million: $0.001 and 190 tokens.
REQUEST = Usage(100, 90)
SERVER = Tariff(Place.SERVER, 1.0, 10.0, has_budget=True)
ENGINE = Tariff(Place.ENGINE, has_budget=True)
BATCH = Tariff(Place.BATCH, 1.0, 10.0, has_budget=True)


def start(session: Session, jobs: int = 1, **budget: Any) -> list[Claim]:
    """Claim jobs of teacher a in stage generate of a run with a budget."""
    run = make_run(session)
    row = session.get_one(Run, run.id)
    row.config = replace(load_config(row.config), budget=convert(budget, BudgetTable)).frozen()
    for _ in range(jobs):
        make_job(session, run.id, teacher_id=run.teacher_ids[0])
    session.flush()
    return [claim for _ in range(jobs) if (claim := queue.claim(session, owner="me")) is not None]


def total(session: Session, claim: Claim) -> Amount:
    found = Amount()
    for amount in expenses.amounts(session, claim.run_id).values():
        found.add(amount)
    return found


def admitted(session: Session, claim: Claim, tariff: Tariff, count: int) -> int:
    return expenses.admit(session, claim, tariff, [REQUEST] * count)[0]


def test_no_more_requests_are_sent_than_a_budget_allows(database: Database) -> None:
    with database.write() as session:
        one, other = start(session, 2, tokens=2 * 190 + 189)
        assert admitted(session, one, SERVER, 1) == 1
        count, lacking = expenses.admit(session, other, SERVER, [REQUEST] * 3)
        assert count == 1
        assert str(lacking) == (
            "budget: tokens of the run are used up: 0 of 569 are spent, and the next request may take 190"
        )
        assert lacking.is_passing  # two requests in flight may turn out shorter
        found = total(session, one)
        assert (found.held, found.held_tokens, found.held_usd) == (2, 380, pytest.approx(0.002))


def test_a_settled_request_frees_what_was_held_for_it_and_counts_what_it_cost(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, usd=0.00261)
        assert admitted(session, claim, SERVER, 3) == 2
        # 100 x $1 + 40 x $10 per million.
        expenses.settle(session, claim, SERVER, Bill(1, usage=Usage(100, 40), held=1, held_usage=REQUEST))
        found = total(session, claim)
        assert (found.requests, found.tokens, found.usd) == (1, 140, pytest.approx(0.0005))
        assert (found.held, found.held_usd) == (1, pytest.approx(0.001))
        assert admitted(session, claim, SERVER, 3) == 1  # 0.0005 + 2 x 0.001 of 0.00261


def test_a_transaction_that_is_repeated_after_its_commit_counts_once(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, tokens=1000)
    for _ in range(2):
        with database.write() as session:
            expenses.admit(session, claim, SERVER, [REQUEST], serial=1)
    with database.read() as session:
        assert total(session, claim).held == 1
    bill = Bill(1, usage=Usage(100, 40), held=1, held_usage=REQUEST, serial=2)
    for _ in range(2):
        with database.write() as session:
            expenses.settle(session, claim, SERVER, bill)
    with database.read() as session:
        found = total(session, claim)
        assert (found.requests, found.tokens, found.held) == (1, 140, 0)


def test_when_nothing_is_in_flight_a_shortage_does_not_pass(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, usd=0.0005)
        count, lacking = expenses.admit(session, claim, SERVER, [REQUEST])
        assert (count, lacking.is_passing) == (0, False)
        assert str(lacking) == (
            "budget: usd of the run is used up: $0.0000 of $0.0005 are spent, and the next request may cost $0.0010"
        )


def test_what_a_lost_worker_had_at_a_server_is_spent_and_only_once(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, tokens=1000)
        assert admitted(session, claim, SERVER, 2) == 2
        session.execute(update(Job).values(lease_until=now(timedelta(seconds=-1))))
        assert len(queue.sweep(session, actor="sweeper")) == 1
        expenses.close(session, claim.id, claim.fence)
        found = total(session, claim)
        assert (found.lost, found.requests, found.tokens, found.held) == (2, 0, 380, 0)
        assert found.usd == pytest.approx(0.002)
        # The lost worker comes back with a result: it was counted when the job was taken from it.
        late = Bill(1, usage=Usage(100, 40), held=1, held_usage=REQUEST)
        expenses.settle_late(session, claim, SERVER, late)
        assert total(session, claim) == found


def test_what_a_lost_worker_had_in_an_engine_of_its_own_costs_nothing(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, tokens=1000)
        assert admitted(session, claim, ENGINE, 2) == 2
        assert queue.release(session, claim, owner="me")
        found = total(session, claim)
        assert (found.lost, found.tokens, found.held_tokens) == (2, 0, 0)


def test_a_batch_stays_in_flight_until_another_worker_collects_it(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, tokens=400)
        count, lacking = expenses.admit(session, claim, BATCH, [REQUEST] * 3)  # all requests of a batch, or none
        assert (count, lacking.is_passing) == (0, False)
        assert str(lacking).endswith("0 of 400 are spent, and the next batch may take 570")
        assert admitted(session, claim, BATCH, 2) == 2
        batches.begin(session, claim.id, "place", 2)
        session.flush()
        assert queue.release(session, claim, owner="me")
        assert total(session, claim).held == 2
        again = queue.claim(session, owner="you")
        assert again is not None
        assert admitted(session, again, BATCH, 2) == 2
        found = total(session, claim)
        assert (found.held, found.held_tokens, found.lost, found.tokens) == (2, 380, 0, 0)


def test_a_rejected_batch_frees_what_was_held_for_it(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, tokens=400)
        assert admitted(session, claim, BATCH, 2) == 2
        key = batches.begin(session, claim.id, "place", 2)
        session.flush()
        batches.note_collected(session, key, fence=claim.fence)
        assert queue.fail(session, claim, "rejected", owner="me", is_final=True) is JobState.FAILED
        found = total(session, claim)
        assert (found.held, found.held_tokens, found.lost, found.tokens) == (0, 0, 0, 0)


def test_nobody_waits_for_a_batch_that_no_worker_has(database: Database) -> None:
    with database.write() as session:
        one, other = start(session, 2, tokens=400)
        assert admitted(session, one, BATCH, 2) == 2
        assert expenses.admit(session, other, SERVER, [REQUEST])[1].is_passing
        batches.begin(session, one.id, "place", 2)
        session.flush()
        assert queue.fail(session, one, "the account is closed", owner="me", is_final=True) is JobState.FAILED
        count, lacking = expenses.admit(session, other, SERVER, [REQUEST])
        assert (count, lacking.is_passing) == (0, False)
        assert total(session, one).held == 2  # the provider may still execute it


def test_a_budget_that_is_removed_leaves_nothing_held_below_zero(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, tokens=1)
        row = session.get_one(Run, claim.run_id)
        row.config = replace(load_config(row.config), budget=None).frozen()
        session.flush()
        assert admitted(session, claim, SERVER, 2) == 2
        expenses.settle(session, claim, SERVER, Bill(2, usage=Usage(200, 80), held=2, held_usage=Usage(200, 180)))
        found = total(session, claim)
        assert (found.tokens, found.held, found.held_tokens, found.held_usd) == (280, 0, 0, 0.0)


def test_stages_and_teachers_have_limits_of_their_own(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, stages={"calibrate": {"tokens": 1}, "generate": {"tokens": 200}})
        count, lacking = expenses.admit(session, claim, SERVER, [REQUEST] * 2)
        assert (count, lacking.scope) == (1, "stage generate")
    with database.write() as session:
        row = session.get_one(Run, claim.run_id)
        budget = convert({"teachers": {"a": {"tokens": 379}, "b": {"tokens": 1}}}, BudgetTable)
        row.config = replace(load_config(row.config), budget=budget).frozen()
        session.flush()
        count, lacking = expenses.admit(session, claim, SERVER, [REQUEST])
        assert (count, lacking.scope) == (0, "teacher a")


def test_a_deadline_and_used_up_engine_hours_stop_requests_that_cost_no_tokens(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session, deadline="2020-01-01T00:00:00Z")
        count, lacking = expenses.admit(session, claim, ENGINE, [Usage(0, 0)])
        assert (count, str(lacking)) == (0, "budget: deadline of the run was 2020-01-01 00:00 UTC")
    with database.write() as session:
        row = session.get_one(Run, claim.run_id)
        row.config = replace(load_config(row.config), budget=BudgetTable(engine_hours=0.5)).frozen()
        expenses.settle(session, claim, ENGINE, Bill(engine_seconds=1799.0))
        assert expenses.admit(session, claim, ENGINE, [Usage(0, 0)]) == (1, None)
        expenses.settle(session, claim, ENGINE, Bill(engine_seconds=1.0))
        count, lacking = expenses.admit(session, claim, ENGINE, [Usage(0, 0)])
        assert (count, str(lacking)) == (
            0,
            "budget: engine_hours of the run are used up: 0.50 of 0.5 are spent",
        )


def test_a_halted_job_takes_the_waiting_ones_of_its_model_with_it(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session)
        run = session.get_one(Run, claim.run_id)
        mine = make_job(session, run.id, teacher_id=claim.teacher_id)
        other = make_job(session, run.id, scorer_id=make_scorer(session, "fake"))
        assert queue.halt(session, claim, "budget: no more", owner="me")
        states = {job_id: session.get_one(Job, job_id).state for job_id in (claim.id, mine, other)}
        assert states == {claim.id: JobState.CANCELLED, mine: JobState.CANCELLED, other: JobState.QUEUED}
        assert queue.halted(session, run.id, "generate") == "budget: no more"


def test_a_later_price_does_not_change_what_was_paid_before(database: Database) -> None:
    with database.write() as session:
        (claim,) = start(session)
        for usd, days in ((1.0, -2), (3.0, 2), (2.0, -1)):
            for kind in (PriceKind.INPUT, PriceKind.OUTPUT):
                at = now(timedelta(days=days))
                session.add(Price(teacher_id=claim.teacher_id, kind=kind, usd=usd, valid_from=at, source="run file"))
        session.flush()
        # The one of tomorrow is not valid yet, the one of yesterday replaces that of the day before.
        known = expenses.prices(session, claim.run_id, teacher_id=claim.teacher_id)
        assert known == {PriceKind.INPUT: 2.0, PriceKind.OUTPUT: 2.0}
        expenses.settle(session, claim, Tariff(Place.SERVER, 2.0, 2.0), Bill(1, usage=Usage(500_000, 500_000)))
        expenses.settle(session, claim, Tariff(Place.SERVER, 3.0, 3.0), Bill(1, usage=Usage(0, 1_000_000)))
        assert total(session, claim).usd == pytest.approx(2.0 + 3.0)
