"""Calls are read from servers and from generated texts, and a malformed one is a failure, never a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web

from persyn.llm import fake, tool_forms
from persyn.llm.chat import Chat
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result, Sampling
from persyn.llm.teachers import chat_completions, chat_server, generation, results
from persyn.llm.template import Conversation
from persyn.llm.tool_forms import FORMS, Said
from tests.chat_server import Server
from tests.llm.families import CHATML, tokenizer
from tests.llm.test_tool_template import ASK, CALL, CALLING, RESULT, TOOLS, call_of
from tests.llm.tool_families import DEEPSEEK, FAMILIES

ROME = call_of("weather", '{"city": "Rome"}')
OSLO = call_of("weather", '{"city": "Oslo"}')
HERMES_ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
HERMES_OSLO = '<tool_call>{"name":"weather","arguments":{"city":"Oslo"}}</tool_call>'


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("hermes", "31 degrees.", None),
        ("hermes", HERMES_ROME, Said("", [ROME])),
        ("hermes", f"Let me see.\n{HERMES_ROME}\n{HERMES_OSLO}", Said("Let me see.", [ROME, OSLO])),
        ("mistral", "31 degrees.", None),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', Said("", [ROME])),
        (
            "mistral",
            'One moment.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]weather[CALL_ID]x1[ARGS]{"city": "Oslo"}',
            Said("One moment.", [ROME, {"id": "x1", **OSLO}]),
        ),
        ("llama3_json", "31 degrees.", None),
        ("llama3_json", '{"name": "Rome", "population": 3}', None),
        ("llama3_json", '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', Said("", [ROME])),
        (
            "llama3_json",
            '{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "weather", "parameters": {"city": "Oslo"}}',
            Said("", [ROME, OSLO]),
        ),
    ],
)
def test_a_form_reads_its_calls_and_no_other_text(form: str, text: str, said: Said | None) -> None:
    assert FORMS[form](text) == said


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>{"name": "weather", "argum'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", "<tool_call></tool_call>"),
        ("mistral", '[TOOL_CALLS] [{"name": "weather"'),
        ("mistral", "[TOOL_CALLS]weather"),
        ("llama3_json", '{"name": "weather", "parameters": {"ci'),
    ],
)
def test_a_malformed_call_is_a_failure(form: str, text: str) -> None:
    cut = Generated(7, text, "length", 3, 9, 0.1)

    result = generation.with_calls(cut, lambda text, tools: FORMS[form](text), text, TOOLS)

    assert isinstance(result, Failed)
    assert result.reason.startswith("bad_tool_call: ")
    assert result.reason.endswith("finish reason length")


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_in_the_form_that_the_models_own_template_writes(family: str) -> None:
    chat = Chat(tokenizer(FAMILIES[family][0]))
    wanted = {"hermes": "hermes", "llama": "llama3_json", "mistral": "mistral", "deepseek": None}[family]
    assert tool_forms.written_by(chat.template) is (FORMS[wanted] if wanted else None)

    ids, start, _ = chat.response_ids(Conversation([ASK], "", None, [CALL], TOOLS))
    raw = generation.raw_text(chat, ids[start:-1], [])
    generated = Generated(1, raw, "stop", start, len(ids) - start, 0.1)
    result = generation.with_calls(generated, generation.call_reader(chat, None), raw, TOOLS)

    assert isinstance(result, Generated)
    assert (result.tool_calls or [CALL])[0]["function"] == CALL["function"]
    assert bool(result.tool_calls) == (wanted is not None)
    assert result.text == ("" if wanted else raw)
    finished = results.to_result(result)
    assert isinstance(finished, Generated)
    assert finished.finish_reason == ("tool_calls" if wanted else "stop")


def test_a_text_is_searched_for_calls_only_if_there_are_tools() -> None:
    chat = Chat(tokenizer(FAMILIES["hermes"][0]))
    generated = Generated(1, HERMES_ROME, "stop", 3, 9, 0.1)

    read = generation.call_reader(chat, None)

    assert generation.with_calls(generated, read, HERMES_ROME, None) is generated
    assert generation.call_reader(Chat(tokenizer(CHATML)), None) is None
    assert generation.call_reader(Chat(tokenizer(DEEPSEEK)), "hermes") is not None


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


def answer(server: Server, *requests: Generate) -> list[Result]:
    engine: Any = chat_server.load(ModelSpec("openai", "m", options={"base_url": server.base_url}), lambda: None)
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    engine.close()
    return results


def reply(**message: Any) -> web.Response:
    return web.json_response({"choices": [{"message": message, "finish_reason": "tool_calls"}]})


def test_a_server_is_sent_tools_and_ids_and_its_calls_come_back(server: Server) -> None:
    call = {"id": "x", "type": "function", "index": 0, "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    server.reply = lambda n: reply(role="assistant", content=None, tool_calls=[call])
    without = CALLING | {"tool_calls": [ROME, OSLO]}
    turns = [ASK, without, {"role": "tool", "content": "31"}, {"role": "tool", "content": "3"}]

    (result,) = answer(server, Generate(1, turns, Sampling(), seed=5, tools=TOOLS))

    assert isinstance(result, Generated)
    assert (result.text, result.finish_reason, result.tool_calls) == ("", "tool_calls", [{"id": "x", **ROME}])
    (body,) = server.bodies
    assert body["tools"] == TOOLS
    assert [call["id"] for call in body["messages"][1]["tool_calls"]] == ["call_1_0", "call_1_1"]
    assert [turn["tool_call_id"] for turn in body["messages"][2:]] == ["call_1_0", "call_1_1"]
    assert chat_completions.with_ids([ASK, CALLING, RESULT]) == [ASK, CALLING, RESULT]


def test_streamed_calls_are_assembled_by_index(server: Server) -> None:
    def piece(*calls: dict[str, Any], **more: Any) -> str:
        return "data: " + json.dumps({"choices": [{"delta": {"tool_calls": list(calls)}, **more}]}) + "\n\n"

    stream = (
        piece({"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}})
        + piece({"index": 0, "function": {"arguments": '{"city":'}})
        + piece({"index": 1, "id": "b", "function": {"name": "weather", "arguments": '{"city": "Os'}})
        + piece({"index": 0, "function": {"arguments": ' "Rome"}'}}, {"index": 1, "function": {"arguments": 'lo"}'}})
        + piece(finish_reason="tool_calls")
        + "data: [DONE]\n\n"
    )
    server.reply = lambda n: web.Response(text=stream, content_type="text/event-stream")

    (result,) = answer(server, Generate(1, [ASK], Sampling(), seed=5, tools=TOOLS))

    assert isinstance(result, Generated)
    assert result.tool_calls == [{"id": "a", **ROME}, {"id": "b", **OSLO}]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"tool_calls": [{"id": "x", "function": {"name": "weather", "arguments": '{"city": "Ro'}}]}, "is not JSON"),
        ({"tool_calls": [{"id": "x", "function": {"arguments": "{}"}}]}, "call 1 has no name"),
        ({"tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "7"}}]}, "must be a JSON object"),
        ({"tool_calls": [{"id": "x", "type": "custom", "custom": {}}]}, "unknown type 'custom'"),
        ({"tool_calls": "f()"}, "is not JSON"),
        ({"tool_calls": [{"id": "x", "function": {"name": "f\0", "arguments": "{}"}}]}, "a NUL"),
        ({"tool_calls": [{"id": "\ud800", "function": {"name": "f"}}]}, "cannot be represented"),
        ({"function_call": {"name": "f", "arguments": '{"a": "\\ud800"}'}}, "cannot hold"),
    ],
)
def test_a_call_that_cannot_be_represented_is_a_failure_with_its_reason(
    server: Server, message: dict[str, Any], said: str
) -> None:
    server.reply = lambda n: reply(content="Let me see.", **message)

    (result,) = answer(server, Generate(1, [ASK], Sampling(), seed=5, tools=TOOLS))

    assert isinstance(result, Failed)
    assert result.reason.startswith("bad_tool_call: ")
    assert said in result.reason


def test_the_fake_engine_calls_tools_and_conforms_to_schemas() -> None:
    engine = fake.load(ModelSpec("fake", "", options={"call_every": 1}), lambda: None)
    schema = {"type": "object", "properties": {"n": {"type": "array", "items": {"type": "integer"}}}}
    engine.submit(
        [
            Generate(1, [ASK], Sampling(), 0, tools=TOOLS),
            Generate(2, [ASK], Sampling(), 0),
            Generate(3, [ASK], Sampling(), 0, schema=schema),
        ]
    )

    called, plain, shaped = engine.step()

    assert isinstance(called, Generated)
    assert called.tool_calls is not None
    arguments = msgspec.json.decode(called.tool_calls[0]["function"]["arguments"])
    assert {name: type(value) for name, value in arguments.items()} == {"city": str, "days": int}
    assert isinstance(plain, Generated)
    assert plain.tool_calls is None
    assert isinstance(shaped, Generated)
    assert [type(n) for n in msgspec.json.decode(shaped.text)["n"]] == [int]
