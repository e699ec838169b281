"""Recalibrations are new; no prompt of an existing run was asked by one, and a recalibrated run is not taken back."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command

from persyn.db.catalog import RunPrompt
from persyn.db.connect import Database, alembic_config
from tests.factories import make_run

BEFORE = "0025"


def test_prompts_of_existing_runs_were_asked_by_no_recalibration(database: Database) -> None:
    with database.write() as session:
        made = make_run(session)
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), BEFORE)
        command.upgrade(alembic_config(connection), "head")

    with database.read() as session:
        found = session.execute(sa.select(RunPrompt.recalibration, RunPrompt.former_teacher_id)).all()
    assert [tuple(row) for row in found] == [(0, None)] * len(made.prompt_ids)


def test_a_store_with_a_recalibrated_run_is_not_taken_back(database: Database) -> None:
    with database.write() as session:
        make_run(session)
        session.execute(sa.update(RunPrompt).values(recalibration=1))
    with (
        pytest.raises(RuntimeError, match="earlier versions know no recalibrated runs, and this store has 1"),
        database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), BEFORE)
