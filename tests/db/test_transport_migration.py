"""Stores of versions that had the transport of their models in them are carried over without losing a response."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, Table, select

from persyn.config import QualityTable, StudentTable, TeacherTable, fingerprint_of
from persyn.db.base import Json
from persyn.db.catalog import Scorer, Teacher
from persyn.db.connect import Database, alembic_config
from persyn.ingest import versions
from persyn.llm.identity import Identity
from persyn.llm.scorers import judge
from tests.factories import digest, make_config

REVISION = "0014"
FOLDER = Identity("sha256:1", "a template's hash")
KNOWN = {("/elsewhere", None): FOLDER, ("/student", None): FOLDER}
SAMPLING = {"max_tokens": 64, "temperature": 0.0, "top_p": 0.5}
#: As it was stored, with the defaults of the fields that there were.
STORED_SAMPLING = {**SAMPLING, "top_k": 0, "repetition_penalty": 1.0, "stop": []}

OLD, NEW = ({"base_url": f"http://{host}/v1", "concurrency": 8, "extra": {"min_p": 0.1}} for host in ("old", "new"))
BEHIND = {"engine": "openai", "options": {"base_url": "http://old/v1", "omit": ["seed"]}}
TEACHERS: list[dict[str, Any]] = [
    {"name": "ada", "engine": "openai", "model": "m", "options": OLD},
    {"name": "ada", "engine": "openai", "model": "m", "options": NEW},
    {"name": "bob", "engine": "transformers", "model": "/folder", "options": {"batch_size": 4}, "gpus": 1},
    {"name": "cyd", "engine": "imported", "model": "cyd", "options": {}},
    {"name": "dan", "engine": "fake", "model": "", "options": {"response_words": 12, "latency_seconds": 1}},
]


def add(connection: Connection, table: str, *rows: dict[str, Any]) -> None:
    found = Table(table, MetaData(), autoload_with=connection)
    for column in found.c:
        if isinstance(column.type, sa.JSON):
            column.type = Json
    for row in rows:
        connection.execute(found.insert().values(row))


def add_old_rows(connection: Connection) -> None:
    now = sa.func.now()
    common = {"created_at": now, "gpus": 0}
    for number, teacher in enumerate(TEACHERS, 1):
        by_content = {"revision": "sha256:1", "template_hash": FOLDER.template_hash} if "gpus" in teacher else {}
        row = {
            "id": number,
            "fingerprint": digest(str(number)),
            "sampling": STORED_SAMPLING,
            "few_shot": [],
            **by_content,
        }
        add(connection, "teachers", common | row | teacher)
    student = {"id": 1, "fingerprint": digest("student"), "name": "s", "model": "/folder", "created_at": now}
    add(connection, "students", student | {"revision": "sha256:1", "template_hash": FOLDER.template_hash})
    words = BEHIND | {"wording": judge.wording(BEHIND)}
    quality = {"id": 1, "fingerprint": digest("quality"), "kind": "judge", "model": "j", "options": words}
    likely = {"id": 2, "fingerprint": digest("likely"), "kind": "log_likelihood", "model": "/folder", "student_id": 1}
    add(connection, "scorers", common | quality)
    add(connection, "scorers", common | likely | {"revision": "sha256:1", "options": {"batch_tokens": 99}})
    prompt = {"id": 1, "content_hash": digest("p"), "text": "p", "source": "x", "meta": {}, "created_at": now}
    add(connection, "prompts", prompt)
    response = {"prompt_id": 1, "teacher_id": 2, "sample": 0, "text": "Four.", "origin": "generated", "created_at": now}
    add(connection, "responses", response)
    config = make_config(teachers=("ada", "eve")).frozen()
    config["quality"] = {"kind": "judge", "model": "j", "options": BEHIND}
    config["teachers"][0] |= TEACHERS[0] | {"gpus": 0}
    run = {"id": 1, "name": "r", "state": "running", "stage": "calibrate", "plans": 1, "config": config, "seed": 0}
    run |= {"config_hash": digest("c"), "student_id": 1, "quality_scorer_id": 1, "learnability_scorer_id": 2}
    add(connection, "runs", run | {"created_at": now})
    add(connection, "run_teachers", {"run_id": 1, "position": 0, "teacher_id": 1})


@pytest.fixture
def upgraded(database: Database) -> Database:
    before = ScriptDirectory.from_config(alembic_config()).get_revision(REVISION).down_revision
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), str(before))
        add_old_rows(connection)
    database.upgrade()
    return database


def test_a_store_with_transport_in_its_versions_is_found_again_by_new_runs(upgraded: Database) -> None:
    def teacher(**columns: Any) -> int:
        table = msgspec.convert({"gpus": 0, "sampling": SAMPLING, **columns}, TeacherTable)
        return versions.teacher(session, table, KNOWN)

    with upgraded.write() as session:
        # Of two equal teachers, the one with a response is found, whatever the address; the other one is kept.
        assert {teacher(**TEACHERS[0]), teacher(**TEACHERS[1])} == {2}
        assert session.get_one(Teacher, 1).fingerprint == digest("1")
        assert teacher(**TEACHERS[2] | {"model": "/elsewhere"}) == 3
        assert teacher(**TEACHERS[3]) == 4
        assert teacher(**TEACHERS[4]) == 5
        student = versions.student(session, StudentTable("s", "/student"), KNOWN)
        assert student.id == 1
        assert versions.learnability(session, student, StudentTable("s", "/student")) == 2
        moved = BEHIND | {"options": BEHIND["options"] | {"base_url": "http://new/v1"}}
        assert versions.quality(session, QualityTable("judge", "j", options=moved), {}) == 1
        assert session.scalars(select(Teacher.options).order_by(Teacher.id)).all() == [
            {"extra": {"min_p": 0.1}},
            {"extra": {"min_p": 0.1}},
            {"dtype": "bfloat16"},
            {},
            {},
        ]
        assert session.get_one(Scorer, 2).options == {"dtype": "float32"}


def test_going_back_puts_the_transport_of_a_run_back_into_its_versions(upgraded: Database) -> None:
    before = ScriptDirectory.from_config(alembic_config()).get_revision(REVISION).down_revision
    with upgraded.engine.begin() as connection:
        command.downgrade(alembic_config(connection), str(before))
        teachers = Table("teachers", MetaData(), autoload_with=connection)
        columns = select(teachers.c.options, teachers.c.gpus, teachers.c.fingerprint).order_by(teachers.c.id)
        options = connection.execute(columns).first()
        assert options is not None
        said = options.options if isinstance(options.options, dict) else msgspec.json.decode(options.options)
        assert (said, options.gpus) == (OLD, 0)
        whole = {"engine": "openai", "model": "m", "revision": None, "template_hash": None, "gpus": 0, "options": OLD}
        whole |= {"sampling": STORED_SAMPLING, "system": None, "few_shot": []}
        assert options.fingerprint == fingerprint_of(whole)  # as versions before computed it
    upgraded.upgrade()
    with upgraded.read() as session:
        assert len(set(session.scalars(select(Teacher.fingerprint)))) == len(TEACHERS)
