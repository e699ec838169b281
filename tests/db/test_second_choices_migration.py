"""Second choices are new; runs without them, and what refers to their jobs, stay as they are."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command

from persyn.db.catalog import Run
from persyn.db.connect import Database, alembic_config
from persyn.db.results import Assignment
from persyn.db.work import Job
from tests.factories import make_assignment, make_job, make_response, make_run

BEFORE = "0023"


def test_an_existing_run_keeps_its_assignments_and_its_costs(database: Database) -> None:
    view = sa.text("SELECT teacher, assigned, responses, response_tokens FROM v_teacher_cost ORDER BY position")
    with database.write() as session:
        made = make_run(session, prompts=1, stage="generate")
        make_assignment(session, made.id, made.prompt_ids[0], made.teacher_ids[0])
        make_response(session, made.prompt_ids[0], made.teacher_ids[0], "two words")
        job_id = make_job(session, made.id)
        before = session.execute(view).all()
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), BEFORE)
        assert connection.execute(view).all() == before == [("a", 1, 1, 2), ("b", 0, 0, 0)]
        command.upgrade(alembic_config(connection), "head")

    with database.write() as session:
        assert session.execute(view).all() == before
        assert session.execute(sa.select(Assignment.choice, Assignment.further)).one() == (1, None)
        follower = make_job(session, made.id, follows_job_id=job_id)
        session.execute(sa.delete(Job).where(Job.id == job_id))
        assert session.scalars(sa.select(Job.follows_job_id).where(Job.id == follower)).one() is None


def test_a_store_with_a_run_that_earlier_versions_cannot_read_is_not_taken_back(database: Database) -> None:
    with database.write() as session:
        for name, more in (("checked", {"generation": {"check": True}}), ("moved", {"fallback": {}}), ("other", {})):
            run = session.get_one(Run, make_run(session, name=name).id)
            run.config = run.config | more
    with (
        pytest.raises(RuntimeError, match=r"know neither \[fallback\] nor generation.check: checked, moved$"),
        database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), BEFORE)
