"""The client against a real server on the loopback that answers as it is told."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from persyn.errors import EngineError
from persyn.llm import openai
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result, Sampling
from tests.chat_server import Server, completion, error

KEY = "sk-very-secret"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


Connect = Callable[..., openai.OpenAI]


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    """Makes engines and closes them after the test."""
    made: list[openai.OpenAI] = []

    def make(**options: Any) -> openai.OpenAI:
        engine = openai.load(ModelSpec("openai", "m", options={"base_url": server.base_url, **options}), lambda: None)
        assert isinstance(engine, openai.OpenAI)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def ask(request_id: int = 1, text: str = "2+2?", **sampling: Any) -> Generate:
    return Generate(request_id, [{"role": "user", "content": text}], Sampling(**sampling), seed=5)


def answer(engine: openai.OpenAI, *requests: Generate) -> list[Result]:
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


def reason(result: Result) -> str:
    assert isinstance(result, Failed)
    return result.reason


def test_nothing_is_sent_before_the_first_request(server: Server, connect: Connect) -> None:
    engine = connect()
    assert engine.step() == []
    time.sleep(0.05)

    assert server.bodies == []
    assert engine.window == 128


def test_a_server_is_not_sent_what_it_refuses(server: Server, connect: Connect) -> None:
    answer(connect(omit=["seed", "temperature", "top_p"], extra={"random_seed": 7}), ask())

    (body,) = server.bodies
    assert body.keys() == {"model", "messages", "max_tokens", "random_seed"}
    with pytest.raises(EngineError, match="omit"):
        connect(omit=["messages"])


def test_a_request_carries_its_sampling_and_the_answer_comes_back(server: Server, connect: Connect) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    server.reply = lambda n: completion("  Four. \n", usage=usage)

    (result,) = answer(connect(), ask(temperature=0.2, top_p=0.9, max_tokens=50, stop=["\n\n"]))

    assert isinstance(result, Generated)
    assert (result.id, result.text, result.finish_reason) == (1, "Four.", "stop")
    assert (result.prompt_tokens, result.response_tokens) == (9, 3)
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "2+2?"}],
            "seed": 5,
            "temperature": 0.2,
            "top_p": 0.9,
            "max_tokens": 50,
            "stop": ["\n\n"],
        }
    ]
    assert "Authorization" not in server.headers[0]


def test_what_only_some_servers_know_is_sent_when_asked_for(server: Server, connect: Connect) -> None:
    engine = connect(extra={"reasoning_effort": "low", "seed": 1}, max_tokens_field="max_completion_tokens")

    answer(engine, ask(top_k=5, repetition_penalty=1.1, max_tokens=7))

    body = server.bodies[0]
    assert (body["top_k"], body["repetition_penalty"], body["max_completion_tokens"]) == (5, 1.1, 7)
    assert (body["reasoning_effort"], body["seed"]) == ("low", 1)
    assert "max_tokens" not in body


def test_a_cut_response_says_so_and_unknown_counts_are_none(server: Server, connect: Connect) -> None:
    server.reply = lambda n: completion("Fo", "length")

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert (result.finish_reason, result.prompt_tokens, result.response_tokens) == ("length", None, None)


def test_the_key_comes_from_the_environment_and_goes_into_the_header_only(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    server.reply = lambda n: error(400, f"the key {KEY} may not do this")

    (result,) = answer(connect(api_key_env="TEACHER_KEY"), ask())

    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert reason(result) == "refused: HTTP 400: the key [key] may not do this"
    assert KEY not in json.dumps(server.bodies)


def test_a_missing_key_and_a_bad_url_are_told_at_once(server: Server, connect: Connect) -> None:
    with pytest.raises(EngineError, match="PERSYN_NO_SUCH_KEY holds no API key"):
        connect(api_key_env="PERSYN_NO_SUCH_KEY")
    with pytest.raises(EngineError, match="localhost:8000"):
        connect(base_url="localhost:8000/v1")
    with pytest.raises(EngineError, match="base_url"):
        openai.load(ModelSpec("openai", "m"), lambda: None)


def test_a_free_slot_is_filled_while_others_wait(server: Server, connect: Connect) -> None:
    async def slowly(n: int) -> web.Response:
        await asyncio.sleep(0.6 if n == 1 else 0.01)
        return completion(str(n))

    server.reply = slowly
    began = time.monotonic()

    results = answer(connect(concurrency=3), *[ask(i) for i in range(20)])

    assert {r.id for r in results} == set(range(20))
    assert results[-1].id == 0
    assert server.most_in_flight == 3
    # One slot is held for 0.6 s; the two others serve the 19 meanwhile.
    assert time.monotonic() - began < 1.2


def test_too_many_requests_are_asked_again_when_the_server_says(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(429, "slow down", **{"Retry-After": "1"}) if n == 1 else completion("Four.")

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert len(server.bodies) == 2
    assert server.at[1] - server.at[0] >= 1.0
    assert result.seconds >= 1.0


def test_a_server_error_is_asked_again_and_then_told(server: Server, connect: Connect) -> None:
    server.reply = lambda n: web.Response(status=500, text="<html>" + "x" * 500)

    (result,) = answer(connect(max_retries=1), ask())

    assert reason(result).startswith("server_error: HTTP 500: <html>xxx")
    assert len(reason(result)) < 250
    assert len(server.bodies) == 2


def test_an_answer_that_takes_too_long_or_breaks_off_is_a_failure(server: Server, connect: Connect) -> None:
    async def sleep(n: int) -> web.Response:
        await asyncio.sleep(5)
        return completion("late")

    server.reply = sleep
    (late,) = answer(connect(timeout_seconds=0.2, max_retries=0), ask())
    server.reply = lambda n: web.Response(text='{"choices": [')
    (broken,) = answer(connect(), ask())

    assert reason(late) == "server_error: no answer within 0.2 s"
    assert reason(broken).startswith("server_error: no chat completion")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("Fo", "content_filter"), "refused: content filter"),
        (error(400, "This model's maximum context length is 8192 tokens. However, you requested"), "too_long: This"),
        (error(422, "the request exceeds the available context size"), "too_long: the request"),
        (error(400, "Unknown role"), "refused: HTTP 400: Unknown role"),
        (web.json_response({"detail": [{"msg": "no"}]}, status=422), 'refused: HTTP 422: [{"msg":"no"}]'),
        (completion("  \n"), "empty: "),
        (completion(None), "empty: "),
    ],
)
def test_what_is_about_one_request_fails_that_request_alone(
    server: Server, connect: Connect, reply: web.Response, expected: str
) -> None:
    server.reply = lambda n: reply if n == 1 else completion("Four.")

    first, second = answer(connect(concurrency=1), ask(1), ask(2))

    assert reason(first).startswith(expected)
    assert isinstance(second, Generated)


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_a_wrong_key_model_or_address_ends_the_engine(server: Server, connect: Connect, status: int) -> None:
    server.reply = lambda n: error(status, "no such thing", Location="http://127.0.0.1:1/")

    with pytest.raises(EngineError, match=f"HTTP {status}: no such thing; check base_url, the model 'm'"):
        answer(connect(), ask())


def test_no_server_ends_the_engine(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]

    with pytest.raises(EngineError, match=f"no server at http://127.0.0.1:{port}/v1/chat/completions"):
        answer(connect(base_url=f"http://127.0.0.1:{port}/v1", max_retries=1), ask())


def test_an_outage_ends_the_engine_and_fails_no_prompt(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(503, "down")
    engine = connect(concurrency=2, max_retries=0)

    with pytest.raises(EngineError, match="17 requests in a row got no answer"):
        answer(engine, *[ask(i) for i in range(100)])

    assert engine.pending == 100


def test_a_request_that_never_gets_an_answer_fails_when_others_do(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(503, "down") if n <= 3 else completion("here")
    engine = connect(concurrency=1, max_retries=0)

    found = {result.id: result for result in answer(engine, *[ask(i) for i in range(5)])}

    assert [isinstance(found[i], Failed) for i in range(5)] == [True] * 3 + [False] * 2
