"""Control charts are new; a store with a run that keeps them is not taken back."""

from __future__ import annotations

import pytest
from alembic import command
from sqlalchemy import func, select

from persyn.db.catalog import Run
from persyn.db.connect import Database, alembic_config
from persyn.db.results import Chart, ChartPoint
from tests.factories import make_job, make_run

BEFORE = "0024"


def test_a_store_is_taken_back_and_forth_unless_a_run_needs_its_charts(database: Database) -> None:
    with database.write() as session:
        run_id = make_run(session).id
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), BEFORE)
        command.upgrade(alembic_config(connection), "head")

    with database.write() as session:
        run = session.get_one(Run, run_id)
        run.config = run.config | {"generation": {"check": True, "when_worse": "stop"}}
        numbers = {"predicted": 0.8, "n": 50, "low": 0.0, "high": 1.0, "reference": 0.7, "weight": 0.8}
        chart = Chart(run_id=run_id, teacher_id=1, **numbers)
        session.add(chart)
        session.flush()
        point = {"responses": 8, "statistic": 1.5, "rising": 8, "total": 3.0, "is_alarm": False}
        session.add(ChartPoint(chart_id=chart.id, job_id=make_job(session, run_id), **point))
    with (
        pytest.raises(RuntimeError, match=r"do not know generation.when_worse: run$"),
        database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), BEFORE)
    with database.write() as session:
        session.delete(session.get_one(Run, run_id))
        session.flush()
        assert session.scalars(select(func.count()).select_from(ChartPoint)).one() == 0
