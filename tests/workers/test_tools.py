"""A run whose prompts have tools and schemas is worked from its file to its dataset."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import select

from persyn.analysis import audit
from persyn.config import TeacherTable
from persyn.dataset import export
from persyn.dataset.options import ExportOptions
from persyn.db.catalog import Prompt, Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.errors import UsageError
from persyn.ingest import versions
from persyn.llm.protocols import Generate, Generated, Sampling
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.stages import answers
from persyn.stages.batch import Done
from persyn.workers.runner.worker import Worker
from tests.one_database import SQLITE
from tests.run_files import write_run

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


def written(folder: Path) -> Path:
    """A run file with plain prompts, prompts with tools, prompts that end with a result, and prompts with a schema."""
    file = write_run(folder, prompts=0, calibration=8, options={"call_every": 2})
    rows = []
    for n in range(5):
        ask = {"role": "user", "content": f"What is {n} plus {n}?"}
        called = [ask, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        rows += [
            {"messages": [ask]},
            {"messages": [ask], "tools": TOOLS},
            {"messages": [*called, {"role": "tool", "content": "3", "tool_call_id": "c1"}], "tools": TOOLS},
            {"messages": [ask], "response_schema": SCHEMA},
        ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@SQLITE
def test_a_run_with_tools_is_worked_to_its_dataset(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(written(tmp_path)), actor="me").id
    Worker(database, Settings(str(database.url), tmp_path), run_id=run_id).run()

    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
        assert list(audit.audit(session, run)) == []
        found = session.execute(
            select(Prompt.tools, Prompt.response_schema, Response.text, Response.tool_calls, Response.failure).join(
                Response, Response.prompt_id == Prompt.id
            )
        ).all()
    assert not [row for row in found if row.failure is not None]
    assert {bool(row.tool_calls) for row in found if row.tools} == {True, False}
    assert not [row for row in found if row.tool_calls and not row.tools]
    assert all(set(json.loads(row.text)) == {"sum"} for row in found if row.response_schema)

    manifest = export.write(database, run_id, tmp_path / "out", ExportOptions())
    assert (manifest.exported, manifest.tools) == (20, True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "messages.jsonl").read_bytes().splitlines()]
    assert sum(bool(line["tools"]) for line in lines) == 10
    assert any(line["messages"][-1].get("tool_calls") for line in lines)


@SQLITE
def test_an_engine_that_cannot_hold_to_a_schema_is_refused_at_the_start(database: Database, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = written(tmp_path)
    config = file.read_text().replace("options = { call_every = 2 }", "options = {}")
    file.write_text(config.replace('model = "bob"\nengine = "fake"', 'model = "model"\nengine = "transformers"'))

    said = "5 prompts have a response_schema, but teacher 'bob' has engine 'transformers', which cannot hold"
    with pytest.raises(UsageError, match=said), database.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="me")


@SQLITE
def test_a_teachers_schema_is_part_of_its_version_only_if_it_has_one(database: Database) -> None:
    plain = TeacherTable(name="ada", model="ada", engine="fake", gpus=0)
    schema = {"type": "object"}
    with database.write() as session:
        ids = [versions.teacher(session, each, {}) for each in (plain, replace(plain, response_schema=schema), plain)]
        first, second = session.get_one(Teacher, ids[0]), session.get_one(Teacher, ids[1])

        assert ids[0] == ids[2] != ids[1]
        assert (first.response_schema, second.response_schema) == (None, schema)
    with pytest.raises(ValueError, match="response_schema is not a JSON schema: unknown type 'thing'"):
        replace(plain, response_schema={"type": "thing"})


def test_a_response_that_breaks_off_under_a_schema_is_a_failure() -> None:
    request = Generate(1, [], Sampling(), 0, schema=SCHEMA)
    made = [Generated(1, text, "length", 3, 4, 0.1) for text in ('{"sum": 3}', '{"sum": ')]
    job: Any = SimpleNamespace(id=1, teacher_id=1)

    whole, cut = (answers._row(job, Done(request, result, "fake 1")) for result in made)

    assert (whole["text"], whole["failure"]) == ('{"sum": 3}', None)
    assert cut["text"] is None
    assert cut["failure"].startswith("invalid_json: ")
    assert "finish reason length" in cut["failure"]
