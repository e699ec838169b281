"""Runs of versions that had one kind of router keep it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import command
from sqlalchemy import Connection, MetaData, Table

from persyn.config import load_config
from persyn.db.base import Json
from persyn.db.catalog import Run
from persyn.db.connect import Database, alembic_config
from persyn.db.results import Router, RouterScore
from tests.factories import MadeRun, digest, make_run

BEFORE = "0017"
KEYS_BEFORE = {"backbone", "revision", "version", "tune", "preferences", "gpus", "options", "engine"}


def table(connection: Connection, name: str) -> Table:
    found = Table(name, MetaData(), autoload_with=connection)
    for column in found.c:
        if isinstance(column.type, sa.JSON):
            column.type = Json
    return found


def add_old_rows(connection: Connection, made: MadeRun) -> None:
    """A router and its scores, as a version before stored them."""
    common = {"revision": None, "tune": "head", "options": {}, "metrics": {}, "teacher_ids": []}
    row = {"id": 1, "fingerprint": digest("r"), "backbone": "b", "path": "p", "sha256": digest("c")}
    connection.execute(table(connection, "routers").insert().values(common | row | {"created_at": sa.func.now()}))
    score = {"router_id": 1, "prompt_id": made.prompt_ids[0], "teacher_id": made.teacher_ids[0], "score": 0.5}
    connection.execute(table(connection, "router_scores").insert().values(score))


def test_an_existing_run_keeps_its_head(database: Database) -> None:
    with database.write() as session:
        made = make_run(session)
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), BEFORE)
        assert "cross_fitted" not in table(connection, "router_scores").c
        config = connection.scalar(sa.select(table(connection, "runs").c.config))
        assert set(config["router"]) == KEYS_BEFORE
        add_old_rows(connection, made)
    database.upgrade()

    with database.read() as session:
        router = load_config(session.get_one(Run, made.id).config).router
        assert (router.kind, router.encoders, router.features) == ("head", ["backbone"], [])
        assert session.get_one(Router, 1).kind == "head"
        assert session.scalars(sa.select(RouterScore.cross_fitted)).all() == [None]
