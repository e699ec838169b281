"""Extensions and imported routers are new; the prompts and routers of existing runs stay as they are."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command

from persyn.db.catalog import RunPrompt
from persyn.db.connect import Database, alembic_config
from persyn.db.results import Router
from tests.factories import make_router, make_run

BEFORE = "0022"


def test_prompts_of_existing_runs_were_there_at_the_start(database: Database) -> None:
    with database.write() as session:
        made = make_run(session)
        router_id = make_router(session, made)
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), BEFORE)
        command.upgrade(alembic_config(connection), "head")

    with database.read() as session:
        assert session.scalars(sa.select(RunPrompt.extension)).all() == [0] * len(made.prompt_ids)
        assert session.get_one(Router, router_id).learned is None
        assert session.scalars(sa.select(Router.id).where(Router.learned.is_(None))).all() == [router_id]


def test_a_store_with_an_imported_router_is_not_taken_back(database: Database) -> None:
    with database.write() as session:
        session.get_one(Router, make_router(session, make_run(session))).learned = {"verdict": "route"}
    with (
        pytest.raises(RuntimeError, match="earlier versions know no imported routers, and this store has 1"),
        database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), BEFORE)
