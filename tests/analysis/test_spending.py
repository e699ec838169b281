"""Plans are made again from measured lengths, with intervals that agree with figures computed by hand."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from persyn.analysis import spending
from persyn.config import load_config
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.spending import Place, PlannedWork
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Bill, Tariff
from persyn.llm.rates import Usage
from tests.factories import make_assignment, make_job, make_response, make_run


def test_a_run_is_planned_again_when_its_prompts_have_teachers(database: Database) -> None:
    # 32 calibration prompts, whose responses of teacher a have 10 or 30 tokens: mean 20, standard deviation 10.
    # 8 targets, 6 of them for a and 2 for b, which has not answered any prompt.
    with database.write() as session:
        run = make_run(session, prompts=40, calibration=32, stage="generate")
        a, b = run.teacher_ids
        row = session.get_one(Run, run.id)
        row.config = {**load_config(row.config).frozen(), "strategy": {"kind": "random"}}
        for number, prompt_id in enumerate(run.prompt_ids[:32]):
            make_response(session, prompt_id, a, prompt_tokens=4, response_tokens=10 + 20 * (number % 2))
            make_assignment(session, run.id, prompt_id, a)
        for number, prompt_id in enumerate(run.prompt_ids[32:]):
            make_assignment(session, run.id, prompt_id, a if number < 6 else b)
    spending.record(database, run.id)
    spending.record(database, run.id)
    with database.read() as session:
        rows = session.scalars(select(PlannedWork).order_by(PlannedWork.teacher_id, PlannedWork.stage)).all()
        mine = {(each.teacher_id, each.stage): each for each in rows}
        of_a, of_b = mine[a, "generate"], mine[b, "generate"]
        assert (of_a.made_in, of_a.requests, of_b.requests) == ("generate", 6, 2)
        # Prompts of 16 or 17 characters with 4 tokens each; 6 x 20 tokens of responses.
        assert of_a.tokens == pytest.approx(6 * 4 + 120, rel=0.02)
        # 1.96 standard deviations of the sum of 6 responses, whose mean is known from 32: 10^2 (6 + 6^2 / 32).
        spread = 1.96 * 10 * (6 + 36 / 32) ** 0.5
        assert of_a.tokens_high - of_a.tokens == pytest.approx(spread)
        assert of_a.tokens - of_a.tokens_low == pytest.approx(spread)
        # Nothing of b was measured: at most max_tokens, 64, and at least one token per response.
        prompt_tokens = of_b.tokens - 2 * 64
        assert (of_b.tokens_high, of_b.tokens_low) == (of_b.tokens, pytest.approx(prompt_tokens + 2))


def test_an_extension_is_planned_once_though_an_earlier_one_is_not_assigned_yet(database: Database) -> None:
    # 8 prompts are planned, evenly, at 64 tokens each and their own; 2 more are planned like 2 of them.
    with database.write() as session:
        run = make_run(session, prompts=8, stage="generate")
        row = session.get_one(Run, run.id)
        row.config = {**load_config(row.config).frozen(), "strategy": {"kind": "random"}}
    spending.record(database, run.id)
    with database.write() as session:
        rows = session.scalars(select(PlannedWork)).all()
        was = [(each.requests, each.tokens, each.tokens_high) for each in rows]
        assert [requests for requests, _, _ in was] == [4, 4]

        spending.add_to_plan(session, session.get_one(Run, run.id), 2)

        now = [(each.requests, each.tokens, each.tokens_high) for each in rows]
    assert now == [pytest.approx([figure * 10 / 8 for figure in figures]) for figures in was]


def test_a_forecast_is_what_is_spent_and_the_rest_at_the_measured_lengths(database: Database) -> None:
    with database.write() as session:
        run = make_run(session, prompts=40, stage="generate")
        a = run.teacher_ids[0]
        for prompt_id in run.prompt_ids:
            make_assignment(session, run.id, prompt_id, a)
        job = make_job(session, run.id, teacher_id=a)
        claim = queue.claim(session, owner="me")
        assert claim is not None
        for prompt_id in run.prompt_ids[:30]:
            make_response(session, prompt_id, a, prompt_tokens=4, response_tokens=20, job_id=job)
        bill = Bill(31, usage=Usage(31 * 4, 30 * 20 + 5), repeats=1, engine_seconds=1800.0)
        expenses.settle(session, claim, Tariff(Place.ENGINE, 1.0, 10.0), bill)
    with database.read() as session:
        found = spending.facts(session, session.get_one(Run, run.id))
        (model,) = [each for each in found.models if each.spent.tokens]
        assert (model.requests, model.spent.tokens, model.spent.engine_hours) == (31, 31 * 4 + 605, 0.5)
        assert model.spent.usd == pytest.approx((31 * 4 + 10 * 605) / 1e6)
        assert model.forecast is not None
        # 10 of 40 prompts are missing. There is no plan of this run: it was not started by `start`.
        assert model.forecast.tokens == pytest.approx(31 * 4 + 605 + 10 * 24, rel=0.02)
        assert (model.planned, found.estimated) == (None, ["1 repeated calls"])


def test_the_latest_plan_counts_for_teachers_that_have_nothing_to_do_either(database: Database) -> None:
    with database.write() as session:
        run = make_run(session, prompts=8, stage="score")
        a, b = run.teacher_ids
        row = session.get_one(Run, run.id)
        row.config = {**load_config(row.config).frozen(), "strategy": {"kind": "random"}}
    spending.record(database, run.id)  # an even split
    with database.write() as session:
        session.get_one(Run, run.id).stage = "generate"
        for prompt_id in run.prompt_ids:
            make_assignment(session, run.id, prompt_id, a)
    spending.record(database, run.id)
    with database.read() as session:
        rows = session.execute(select(PlannedWork.made_in, PlannedWork.teacher_id, PlannedWork.requests)).all()
        assert sorted(tuple(row) for row in rows) == [
            *(("generate", a, 8.0), ("generate", b, 0.0)),
            *(("score", a, 4.0), ("score", b, 4.0)),
        ]
        found = spending.facts(session, session.get_one(Run, run.id))
        (model,) = found.models
        assert model.planned is not None
        # 8 prompts of at most 64 tokens each, and their own.
        assert found.planned == model.planned == found.forecast
        assert model.planned.tokens == pytest.approx(8 * (64 + 4 + 5), rel=0.05)
        assert found.rest_words == f"{found.planned.tokens:,.0f} tokens"  # no dollars are known
