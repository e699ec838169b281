"""Tools, calls and results are exported whole, or the format is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy.orm import Session

from persyn.dataset import export
from persyn.dataset.manifest import Manifest
from persyn.dataset.options import ExportOptions
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.ingest import rows
from persyn.ingest.rows import PromptRow
from tests.factories import MadeRun, make_assignment, make_prompt, make_response, make_run

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
AS_OBJECT = CALL | {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK = {"role": "user", "content": "Is it warm?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1"}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answer(session: Session, run: MadeRun, prompt_id: int, text: str, **columns: Any) -> None:
    make_assignment(session, run.id, prompt_id, run.teacher_ids[0])
    make_response(session, prompt_id, run.teacher_ids[0], text, **columns)


@pytest.fixture
def run(database: Database) -> MadeRun:
    """A plain prompt, one answered by a call, and one that ends with the result of a call."""
    with database.write() as session:
        made = make_run(session, prompts=1)
        called = make_prompt(session, "Is it cold?", tools=TOOLS)
        result = make_prompt(session, "31 degrees", history=[ASK, CALLING], last_turn=RESULT, tools=TOOLS)
        answer(session, made, made.prompt_ids[0], "Four.")
        answer(session, made, called, "", tool_calls=[CALL])
        answer(session, made, result, "Yes.")
    return MadeRun(made.id, made.teacher_ids, [*made.prompt_ids, called, result])


def write(database: Database, run: MadeRun, folder: Path, **options: Any) -> Manifest:
    return export.write(database, run.id, folder, ExportOptions(**options))


def test_every_format_but_alpaca_has_the_tools_of_every_row(database: Database, run: MadeRun, tmp_path: Path) -> None:
    manifest = write(database, run, tmp_path / "out")

    assert manifest.tools
    assert [file.format for file in manifest.files] == ["messages", "prompt-completion", "sharegpt", "parquet"]
    plain, called, result = lines(tmp_path / "out" / "messages.jsonl")
    assert [row["tools"] for row in (plain, called, result)] == [[], TOOLS, TOOLS]
    assert called["messages"][-1] == {"role": "assistant", "content": "", "tool_calls": [AS_OBJECT]}
    assert result["messages"][1:3] == [CALLING | {"tool_calls": [AS_OBJECT]}, RESULT | {"content": "31 degrees"}]
    pair = lines(tmp_path / "out" / "prompt_completion.jsonl")[1]
    assert (pair["completion"], pair["tools"]) == (called["messages"][-1:], TOOLS)
    plain, called, result = lines(tmp_path / "out" / "sharegpt.jsonl")
    assert [json.loads(row["tools"]) for row in (plain, called)] == [[], [TOOLS[0]["function"]]]
    assert [turn["from"] for turn in result["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(called["conversations"][-1]["value"]) == {"name": "weather", "arguments": {"city": "Rome"}}
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_bytes())
    assert {name: entry["columns"]["tools"] for name, entry in info.items()} == {"run_sharegpt": "tools"}


def test_the_parquet_file_is_read_back_as_the_same_prompts(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", formats=("parquet",))

    table = pq.read_table(tmp_path / "out" / "dataset.parquet")
    table = table.set_column(1, "messages", [[turns.as_py()[:-1] for turns in table.column("messages")]])
    pq.write_table(table, tmp_path / "again.parquet")
    found = [row for row in rows.read(tmp_path / "again.parquet") if isinstance(row, PromptRow)]

    assert [row.tools for row in found] == [None, TOOLS, TOOLS]
    assert found[2].messages == [ASK, CALLING, RESULT | {"content": "31 degrees"}]


def test_a_format_that_cannot_hold_tools_is_refused_by_name(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'alpaca' cannot represent tools"):
        write(database, run, tmp_path / "out", formats=("messages", "alpaca"))

    with database.write() as session:
        answer(session, run, make_prompt(session, "And now?", tools=TOOLS), "Let me see.", tool_calls=[CALL])
    with pytest.raises(UsageError, match="format 'sharegpt' cannot represent a text or reasoning beside calls"):
        write(database, run, tmp_path / "out", formats=("sharegpt",))
    manifest = write(database, run, tmp_path / "out")
    assert [file.format for file in manifest.files] == ["messages", "prompt-completion", "parquet"]


def test_a_call_after_reasoning_is_not_written_without_it(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        prompt = make_prompt(session, "And now?", tools=TOOLS)
        answer(session, run, prompt, "", tool_calls=[CALL], reasoning="I must look.")

    with pytest.raises(UsageError, match="format 'sharegpt' cannot represent a text or reasoning beside calls"):
        write(database, run, tmp_path / "out", formats=("sharegpt",))
    write(database, run, tmp_path / "out", formats=("sharegpt",), reasoning="drop")


def test_a_dataset_without_tools_has_no_column_for_them(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        run = make_run(session, prompts=1)
        answer(session, run, run.prompt_ids[0], "Four.")

    manifest = write(database, run, tmp_path / "out")

    assert not manifest.tools
    assert [file.format for file in manifest.files] == list(ExportOptions().formats)
    assert "tools" not in lines(tmp_path / "out" / "messages.jsonl")[0]
    assert "tools" not in lines(tmp_path / "out" / "sharegpt.jsonl")[0]


READ = """
import json, sys
from datasets import load_dataset
for name in sys.argv[3:]:
    print(json.dumps(load_dataset(sys.argv[1], name, cache_dir=sys.argv[2])["train"][1]))
"""


def test_datasets_reads_calls_as_they_are(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", formats=("messages", "prompt-completion", "sharegpt"))

    command = [sys.executable, "-c", READ, str(tmp_path / "out"), str(tmp_path / "cache"), "messages", "sharegpt"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )

    messages, sharegpt = map(json.loads, done.stdout.splitlines())
    assert messages["messages"][-1] == {"role": "assistant", "content": "", "tool_calls": [AS_OBJECT]}
    assert messages["tools"] == TOOLS
    assert json.loads(sharegpt["tools"]) == [TOOLS[0]["function"]]
