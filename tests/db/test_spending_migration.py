"""An existing store is upgraded with the expenses of its responses and the prices of its teachers."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from msgspec.structs import replace
from sqlalchemy import select, text

from persyn.config import BudgetTable, load_config
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database, alembic_config
from persyn.db.spending import Expense, Price
from tests.factories import make_job, make_response, make_run

REVISION = "0021"


def test_existing_responses_have_expenses(database: Database) -> None:
    with database.write() as session:
        run = make_run(session)
        a, b = run.teacher_ids
        one, other = (make_job(session, run.id, teacher_id=teacher_id) for teacher_id in run.teacher_ids)
        for prompt_id in run.prompt_ids[:3]:
            make_response(session, prompt_id, a, prompt_tokens=10, response_tokens=100, job_id=one)
        make_response(session, run.prompt_ids[0], b, prompt_tokens=10, response_tokens=1, job_id=other)
        make_response(session, run.prompt_ids[1], b, None, failure="refused: no", job_id=other)
        make_response(session, run.prompt_ids[2], b, prompt_tokens=10, response_tokens=1)  # imported
        session.execute(text("UPDATE teachers SET price_in = 1, price_out = 2 WHERE name = 'a'"))
        session.get_one(Run, run.id).state = RunState.PAUSED
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), f"{REVISION}-1")
        assert connection.scalar(text("SELECT state FROM runs")) == "cancelled"
        command.upgrade(alembic_config(connection), "head")
    with database.read() as session:
        found = {row.job_id: row for row in session.scalars(select(Expense))}
        assert {job_id: (row.requests, row.prompt_tokens, row.response_tokens) for job_id, row in found.items()} == {
            one: (3, 30, 300),
            other: (2, 10, 1),
        }
        assert (found[one].usd, found[other].usd) == (pytest.approx(0.00063), None)
        prices = session.execute(select(Price.teacher_id, Price.kind, Price.usd).order_by(Price.kind)).all()
        assert [tuple(row) for row in prices] == [(a, "input", 1.0), (a, "output", 2.0)]


def test_a_store_with_a_configuration_that_earlier_versions_cannot_read_is_not_taken_back(database: Database) -> None:
    with database.write() as session:
        runs = {name: session.get_one(Run, make_run(session, name=name).id) for name in ("limited", "judge", "shares")}
        made = {name: load_config(run.config) for name, run in runs.items()}
        judge, strategy = made["judge"].quality, made["shares"].strategy
        changed: dict[str, dict[str, Any]] = {
            "limited": {"budget": BudgetTable(usd=1.0)},
            "judge": {"quality": replace(judge, kind="judge", options={"engine": "fake", "price_in": 1.0})},
            "shares": {"strategy": replace(strategy, max_share=0.5)},
        }
        for name, run in runs.items():
            run.config = replace(made[name], **changed[name]).frozen()
        make_run(session, name="other")
    with (
        pytest.raises(RuntimeError, match=r"earlier versions know no budgets, .*: judge, limited, shares$"),
        database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), f"{REVISION}-1")
