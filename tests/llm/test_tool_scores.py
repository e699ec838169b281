"""Scorers see the tools and the calls of a response, or say that they read texts only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from persyn.llm.protocols import Failed, Judge, Judged, ModelSpec, Result
from persyn.llm.scorers import custom_function, instructions, judge, text_only
from tests.chat_server import Server, completion
from tests.llm.test_tool_template import ASK, CALL, CALLING, RESULT, TOOLS

CALLED = Judge(1, [ASK], "", tools=TOOLS, tool_calls=[CALL])


def brevity(messages: list[Any], response: str, answer: str | None, meta: dict[str, Any]) -> float:
    """How many calls a response makes and how many tools there are; a scorer of these tests."""
    return 10 * len(meta.get("tool_calls", ())) + len(meta.get("tools", ()))


def score(engine: Any, *requests: Judge) -> list[Result]:
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


@pytest.mark.parametrize("against", [None, "answer"])
def test_a_judge_sees_the_tools_and_the_calls(server: Server, against: str | None) -> None:
    reply = '{"better": "A"}' if against else '{"rating": 5}'
    server.reply = lambda n: completion(reply)
    options = {"engine": "openai", "options": {"base_url": server.base_url}, "against": against}
    engine = judge.load(ModelSpec("judge", "m", options=options), lambda: None)
    called = Judge(1, [ASK, CALLING, RESULT], "One moment.", "31", tools=TOOLS, tool_calls=[CALL])

    score(engine, called)

    line = server.bodies[0]["messages"][-1]["content"].split("\n")[1]
    material = json.loads(line)
    assert material["tools"] == TOOLS
    assert material["conversation"] == [ASK, CALLING, RESULT]
    assert material["A" if against else "response"] == {"text": "One moment.", "tool_calls": [CALL]}
    engine.inner.close()


def test_a_python_scorer_gets_them_in_the_row() -> None:
    engine = custom_function.load(ModelSpec("python", f"{__name__}:brevity"), lambda: None)

    assert score(engine, CALLED, Judge(2, [ASK], "Yes.")) == [Judged(1, 11.0), Judged(2, 0.0)]


def test_a_scorer_of_texts_refuses_a_response_that_only_calls() -> None:
    said = "tool_calls: the response calls a tool and has no text to score"
    engine = instructions.load(ModelSpec("instructions", ""), lambda: None)
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

    refused, scored = score(engine, CALLED, Judge(2, [ASK], "One moment.", meta=row, tools=TOOLS, tool_calls=[CALL]))

    assert refused == Failed(1, said)
    assert isinstance(scored, Judged)
    assert scored.value == 1.0
    assert text_only.refusal(Judge(3, [ASK], "")) is None
