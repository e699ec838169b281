"""Rows with tools, calls and schemas: layouts agree, and what cannot be kept is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from persyn.config import fingerprint_of
from persyn.db.catalog import Prompt
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.ingest import prompt_import, responses, rows
from persyn.ingest.record import Flaw
from persyn.ingest.rows import BadRow, PromptRow, parse

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
ASK = {"role": "user", "content": "Is it warm in Rome?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "31 degrees", "tool_call_id": "c1", "name": "weather"}
TURNS = [ASK, CALLING, ANSWER]


def why(record: dict[str, Any]) -> str:
    with pytest.raises(Flaw) as found:
        parse(record)
    return str(found.value)


def without_id(call: dict[str, Any]) -> dict[str, Any]:
    return {key: said for key, said in call.items() if key != "id"}


@pytest.mark.parametrize("tools", [TOOLS, [FUNCTION], json.dumps(TOOLS), [json.dumps(FUNCTION)]])
def test_every_form_of_tools_gives_the_same_prompt(tools: Any) -> None:
    row = parse({"messages": TURNS, "tools": tools})

    assert row.tools == TOOLS
    assert (row.history, row.text) == (TURNS[:2], "31 degrees")
    assert row.last_turn == {"role": "tool", "tool_call_id": "c1", "name": "weather"}
    assert row.messages == TURNS
    assert row.meta == {}


@pytest.mark.parametrize(
    "call",
    [
        CALL | {"function": {"name": "weather", "arguments": {"city": "Rome"}}},
        CALL | {"function": {"name": "weather", "arguments": '{"city":"Rome"}'}, "index": 0},
        {"id": "c1", "name": "weather", "arguments": {"city": "Rome", "unit": None}},
        json.dumps(CALL),
    ],
)
def test_arguments_are_stored_as_json_text_however_they_are_given(call: Any) -> None:
    assert (
        parse({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, ANSWER]}).messages
        == TURNS
    )


def test_llama_factorys_layout_is_read_as_turns_with_calls() -> None:
    said = [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "31 degrees"},
        {"from": "gpt", "value": "Yes."},
    ]

    row = parse({"conversations": said, "tools": json.dumps([FUNCTION])})

    assert row.messages == [
        ASK,
        CALLING | {"tool_calls": [without_id(CALL)]},
        {"role": "tool", "content": "31 degrees"},
    ]
    assert (row.tools, row.meta) == (TOOLS, {"reply": "Yes."})
    asks = parse({"conversations": said[:2], "tools": ""})
    assert (asks.messages, asks.tools) == ([ASK], None)
    assert asks.meta == {"reply": {"content": "", "tool_calls": [without_id(CALL)]}}


def test_legacy_function_calls_are_calls() -> None:
    legacy = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }

    row = parse({"messages": [ASK, legacy, {"role": "function", "name": "weather", "content": "31 degrees"}]})

    assert row.history == [ASK, CALLING | {"tool_calls": [without_id(CALL)]}]
    assert row.last_turn == {"role": "tool", "name": "weather"}


def test_the_hash_of_a_prompt_without_tools_is_that_of_its_turns() -> None:
    plain = parse({"messages": [ASK]})
    assert plain.content_hash == fingerprint_of([ASK]) == parse({"messages": [ASK], "tools": "[]"}).content_hash

    schema = {"response_schema": {"type": "object"}}
    others = [{}, {"tools": TOOLS}, schema, schema | {"tools": TOOLS}, {"tools": [FUNCTION | {"name": "climate"}]}]
    assert len({parse({"messages": [ASK], **more}).content_hash for more in others}) == len(others)
    ends = [ANSWER, ANSWER | {"name": "climate"}, {"role": "tool", "content": ANSWER["content"]}]
    assert len({parse({"messages": [ASK, CALLING, end]}).content_hash for end in ends}) == len(ends)


def test_a_response_schema_is_read_in_openais_form_too() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    openai = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}

    for more in (
        {"response_schema": schema},
        {"response_schema": json.dumps(schema)},
        {"response_format": openai},
        {"response_format": json.dumps(openai)},
    ):
        row = parse({"prompt": "How many?", **more})
        assert (row.response_schema, row.meta) == (schema, {})
    assert parse({"prompt": "a", "response_format": {"type": "json_object"}}).response_schema == {"type": "object"}
    assert parse({"prompt": "a", "response_format": {"type": "text"}}).response_schema is None
    assert parse({"prompt": "a", "response_format": "one word"}).meta == {"response_format": "one word"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": ["search"]}, "'tools': is not JSON"),
        ({"tools": [1]}, "'tools': tool 1 must be a function, got 1"),
        ({"tools": "search"}, "'tools': is not JSON"),
        ({"tools": [{"type": "web_search"}]}, "tool 1 is not a function"),
        ({"tools": [{"description": "x", "function": {}}]}, "tool 1 has no name"),
        ({"tools": [FUNCTION, FUNCTION]}, "the function 'weather' occurs twice"),
        ({"tools": [{"name": "f", "parameters": {"x": 1, "type": "str"}}]}, "tool 1 ('f'): 'parameters' is not a JSON"),
        ({"tools": [{"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}]}, "unknown type 'text'"),
        ({"tools": [{"name": "f", "parameters": {"properties": {"a": {"maximum": 2**70}}}}]}, "cannot be represented"),
        ({"response_schema": {"type": "thing"}}, "'response_schema' is not a JSON schema: unknown type 'thing'"),
        ({"response_schema": "a table"}, "'response_schema' is not a JSON schema: it is not an object"),
        ({"response_format": {"type": "json_schema"}}, "'response_format' is not a JSON schema"),
    ],
)
def test_what_cannot_be_tools_or_a_schema_is_refused(more: dict[str, Any], said: str) -> None:
    assert said in why({"prompt": "a", **more})


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([ASK, CALLING | {"tool_calls": [{"id": "c1", "function": {"arguments": "{}"}}]}], "call 1 has no name"),
        (
            [ASK, CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a": '}}]}],
            "turn 2: 'tool_calls': call 1 ('f'): 'arguments' is not JSON",
        ),
        (
            [ASK, CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}],
            "'arguments' must be a JSON object",
        ),
        (
            [ASK, CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]}],
            "the key 'a' occurs twice",
        ),
        ([ASK, CALLING | {"tool_calls": [CALL | {"type": "custom"}]}], "call 1 has the unknown type 'custom'"),
        ([ASK, CALLING | {"tool_calls": [CALL | {"cache": 1}]}], "call 1 has 'cache', which would be lost"),
        ([ASK, CALLING | {"function_call": {"name": "f"}}], "both 'tool_calls' and 'function_call'"),
        ([ASK, CALLING, ASK], "turn 3 is the user's, expected the tool's"),
        ([ASK, CALLING, ANSWER | {"tool_call_id": "c2"}], "turn 3 answers the call 'c2', which was not made before it"),
        ([ASK, CALLING, ANSWER, ANSWER], "turn 4 answers the call 'c1', which was not made before it"),
        ([ASK, CALLING, ANSWER | {"content": [{"type": "image_url"}]}], "must be one text, got 1 parts (image_url)"),
        ([ASK, CALLING, ANSWER | {"audio": "x"}], "turn 3 has 'audio', which would be lost"),
        ([ASK | {"tool_calls": [CALL]}], "turn 1 has 'tool_calls', which would be lost"),
        ([ANSWER], "turn 1 is the tool's, expected the user's"),
    ],
)
def test_turns_that_cannot_be_kept_are_refused_by_name(turns: list[Any], said: str) -> None:
    assert said in why({"messages": turns})


def test_parquets_nulls_are_no_part_of_tools_or_calls(tmp_path: Path) -> None:
    other = {"name": "sum", "parameters": {"type": "object", "properties": {"a": {"type": "number", "minimum": 0}}}}
    sums = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
    as_object = CALL | {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    records = [
        {"messages": [ASK, CALLING | {"tool_calls": [as_object]}, ANSWER], "tools": [FUNCTION]},
        {"messages": [ASK, CALLING | {"tool_calls": [sums]}, {"role": "tool", "content": "1"}], "tools": [other]},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")

    found = list(rows.read(tmp_path / "p.parquet"))

    assert not [row for row in found if isinstance(row, BadRow)]
    first, second = [row for row in found if isinstance(row, PromptRow)]
    assert (first.messages, first.tools) == (TURNS, TOOLS)
    assert second.tools == [{"type": "function", "function": other}]
    assert second.history is not None
    assert second.history[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_tools_and_calls_are_stored_and_read_back(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": TURNS, "tools": TOOLS, "response_schema": {"type": "object"}}) + "\n")

    with database.write() as session:
        assert prompt_import.import_prompts(session, [path]).new == 1
        assert prompt_import.import_prompts(session, [path]).new == 0

    with database.read() as session:
        prompt = session.scalars(select(Prompt)).one()
        assert (prompt.tools, prompt.response_schema) == (TOOLS, {"type": "object"})
        assert prompt.last_turn == {"role": "tool", "tool_call_id": "c1", "name": "weather"}
        assert prompt.history == TURNS[:2]


def test_an_imported_reply_may_be_a_call(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    cells = [
        {"messages": [ASK], "tools": TOOLS, "teacher": "ada", "response": "", "tool_calls": [CALL]},
        {"messages": [ASK, CALLING], "tools": TOOLS, "teacher": "bob"},
        {"messages": [ASK], "tools": TOOLS, "teacher": "ada", "response": "", "tool_calls": [CALL | {"id": "c9"}]},
        {"messages": [ASK], "tools": TOOLS, "teacher": "eve", "response": "No."},
    ]
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells))

    with database.write() as session:
        report = responses.import_responses(session, [path])

    assert (report.new, report.conflicts) == (3, 1)
    with database.read() as session:
        found = session.execute(select(Response.text, Response.tool_calls, Response.failure).order_by(Response.id))
        assert [tuple(row) for row in found] == [("", [CALL], None), ("", [CALL], None), ("No.", None, None)]
