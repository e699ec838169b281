"""A run is charged at the prices of its own file, and what it has spent without them is priced once they are known."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.spending import Place
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Bill, Tariff
from persyn.jobs.queue import Claim
from persyn.llm.protocols import ModelSpec
from persyn.llm.rates import Usage
from persyn.runs import prices
from tests.factories import MadeRun, make_job, make_run

BATCH = {"engine": "openai", "options": {"mode": "batch", "base_url": "http://127.0.0.1:1/v1", "batch_discount": 0.5}}


def note(session: Session, run: MadeRun, **table: Any) -> None:
    """Read prices of teacher a in the run's file."""
    row = session.get_one(Run, run.id)
    config = load_config(row.config)
    config = replace(config, teachers=[replace(config.teachers[0], **table), *config.teachers[1:]])
    prices.note(session, row, config, run.teacher_ids)


def claimed(session: Session, run: MadeRun) -> Claim:
    make_job(session, run.id, teacher_id=run.teacher_ids[0])
    claim = queue.claim(session, owner="me")
    assert claim is not None
    return claim


def spend(session: Session, run: MadeRun, place: Place) -> None:
    expenses.settle(session, claimed(session, run), Tariff(place), Bill(1, usage=Usage(100, 90)))


def cost(session: Session, run: MadeRun) -> tuple[float, int]:
    """US dollars, and the number of claims without."""
    (amount,) = expenses.amounts(session, run.id).values()
    return amount.usd, amount.unpriced


def test_the_file_of_another_run_changes_neither_later_nor_earlier_expenses(database: Database) -> None:
    with database.write() as session:
        mine, unpriced, other = (make_run(session, name=name) for name in ("mine", "unpriced", "other"))
        assert mine.teacher_ids == other.teacher_ids
        note(session, mine, price_in=10.0, price_out=20.0)
        spend(session, unpriced, Place.ENGINE)
        note(session, other, price_in=0.0, price_out=0.0)
        for run, expected in ((mine, (10.0, 20.0)), (unpriced, (None, None)), (other, (0.0, 0.0))):
            found = expenses.tariff(session, claimed(session, run), ModelSpec("fake", "a"))
            assert (found.price_in, found.price_out) == expected
        assert cost(session, unpriced) == (0.0, 1)


def test_what_was_spent_before_the_second_price_is_priced_with_it(database: Database) -> None:
    with database.write() as session:
        run = make_run(session)
        note(session, run, price_in=1.0)
        spend(session, run, Place.ENGINE)
        note(session, run, price_in=1.0)
        assert cost(session, run) == (0.0, 1)
        note(session, run, price_in=1.0, price_out=10.0)
        assert cost(session, run) == (pytest.approx((100 * 1 + 90 * 10) / 1e6), 0)


def test_what_a_batch_spent_is_priced_when_its_mode_has_prices(database: Database) -> None:
    with database.write() as session:
        run = make_run(session)
        note(session, run, price_in=1.0, price_out=10.0)
        spend(session, run, Place.BATCH)
        assert cost(session, run) == (0.0, 1)
        note(session, run, price_in=1.0, price_out=10.0, **BATCH)
        assert cost(session, run) == (pytest.approx((100 * 0.5 + 90 * 5) / 1e6), 0)
