"""Runs without a student or learnability are new; other runs, and what refers to them, stay as they are."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command

from persyn.config import COMBINED
from persyn.db.catalog import Run, RunPrompt
from persyn.db.connect import Database, alembic_config
from tests.factories import make_run, make_scorer

BEFORE = "0019"


def test_an_existing_run_keeps_its_student_and_its_prompts(database: Database) -> None:
    with database.write() as session:
        made = make_run(session)
        run = session.get_one(Run, made.id)
        before = run.student_id, run.learnability_scorer_id, run.config
    with database.engine.begin() as connection:  # with foreign keys on
        command.downgrade(alembic_config(connection), BEFORE)
        with pytest.raises(sa.exc.IntegrityError), connection.begin_nested():
            connection.exec_driver_sql("UPDATE runs SET student_id = NULL")
        command.upgrade(alembic_config(connection), "head")
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"

    with database.read() as session:
        run = session.get_one(Run, made.id)
        assert (run.student_id, run.learnability_scorer_id, run.config) == before
        assert session.scalar(sa.select(sa.func.count()).select_from(RunPrompt)) == len(made.prompt_ids)
    with database.write() as session:
        session.execute(sa.update(Run).values(student_id=None, learnability_scorer_id=None))


def test_a_store_with_a_run_that_earlier_versions_cannot_read_is_not_taken_back(database: Database) -> None:
    with database.write() as session:
        session.get_one(Run, make_run(session, name="by-quality").id).learnability_scorer_id = None
        session.get_one(Run, make_run(session, name="combined").id).quality_scorer_id = make_scorer(session, COMBINED)
        make_run(session, name="other")
    with (
        pytest.raises(RuntimeError, match=r"earlier versions know no runs .*: by-quality, combined"),
        database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), BEFORE)
