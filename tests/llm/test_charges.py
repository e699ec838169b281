"""What a server may charge for is reported with results, also where no usable response came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from persyn.errors import OutageError
from persyn.llm.protocols import Failed, Generated, Judge, Judged, ModelSpec
from persyn.llm.rates import Costs, Usage, usage_of
from persyn.llm.scorers import judge
from persyn.llm.teachers import chat_server
from tests.chat_server import Server, completion, error
from tests.llm.asking import answer, ask

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., chat_server.ChatServerEngine]]:
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(chat_server.load(ModelSpec("openai", "m", options={"base_url": server.base_url, **options}), print))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


async def _late() -> web.StreamResponse:
    await asyncio.sleep(1.0)
    return completion("Too late.", usage=USAGE)


def test_a_call_that_was_late_may_be_charged_and_one_that_was_rejected_is_not(
    server: Server, connect: Callable[..., Any]
) -> None:
    replies: list[Any] = [lambda: error(503, "busy"), _late, lambda: web.Response(text="<html>"), None]
    server.reply = lambda n: replies[n - 1]() if replies[n - 1] else completion("Four.", usage=USAGE)
    (found,) = answer(connect(timeout_seconds=0.3, max_retries=5), ask("2 + 2?")).values()
    assert isinstance(found, Generated)
    assert (found.repeats, usage_of(found)) == (2, Usage(7, 5))


@pytest.mark.parametrize(
    ("reply", "reason", "usage", "repeats"),
    [
        (lambda: completion("", usage=USAGE), "empty", Usage(7, 5), 0),
        (lambda: completion(""), "empty", Usage(0, 0), 1),
        (lambda: completion("<think>Hmm", "length"), "unfinished_reasoning", Usage(0, 0), 1),
        (lambda: completion("No.", "content_filter", usage=USAGE), "refused", Usage(7, 5), 0),
        (lambda: completion("No.", "content_filter"), "refused", Usage(0, 0), 1),
        (
            lambda: error(
                400,
                "blocked by our content policy",
            ),
            "refused",
            Usage(0, 0),
            0,
        ),
    ],
)
def test_a_failure_has_the_tokens_that_were_computed(
    server: Server, connect: Callable[..., Any], reply: Any, reason: str, usage: Usage, repeats: int
) -> None:
    server.reply = lambda n: reply() if n == 1 else completion("Four.", usage=USAGE)
    found = answer(connect(max_retries=0), ask("2 + 2?"))[0]
    assert isinstance(found, Failed)
    assert found.reason.startswith(reason)
    assert (usage_of(found), found.repeats) == (usage, repeats)


def test_an_outage_says_how_many_calls_may_be_charged(server: Server, connect: Callable[..., Any]) -> None:
    server.reply = lambda n: _late()
    with pytest.raises(OutageError) as raised:
        answer(connect(timeout_seconds=0.2, max_retries=1), ask("2 + 2?"))
    assert raised.value.may_be_charged == 2


def test_an_unreadable_verdict_that_nobody_counted_may_be_charged(server: Server) -> None:
    server.reply = lambda n: completion("Good.")
    behind = {"base_url": server.base_url, "max_retries": 0}
    engine = judge.load(ModelSpec("judge", "m", options={"engine": "openai", "options": behind}), lambda: None)
    (found,) = answer(engine, Judge(0, [{"role": "user", "content": "2 + 2?"}], "Four.")).values()  # type: ignore[arg-type]
    assert isinstance(found, Failed)
    assert (usage_of(found), found.repeats) == (Usage(0, 0), 1)
    engine.inner.close()  # type: ignore[attr-defined]


def test_a_judge_counts_both_of_its_replies(server: Server) -> None:
    server.reply = lambda n: completion('{"rating": 5}', usage=USAGE)
    behind = {"base_url": server.base_url, "max_retries": 0}
    spec = ModelSpec("judge", "m", options={"engine": "openai", "options": behind, "max_tokens": 50})
    engine = judge.load(spec, lambda: None)
    request = Judge(0, [{"role": "user", "content": "2 + 2?"}], "Four.")
    (found,) = answer(engine, request).values()  # type: ignore[arg-type]
    assert isinstance(found, Judged)
    assert usage_of(found) == Usage(14, 10)
    # Upper estimates: max_tokens of each reply, and no fewer tokens than bytes of the longest prompt.
    longest = max(len(message["content"]) for body in server.bodies for message in body["messages"])
    most = Costs(spec).most(request)
    assert most.response_tokens == 100
    assert most.prompt_tokens > 2 * longest
    engine.inner.close()  # type: ignore[attr-defined]
