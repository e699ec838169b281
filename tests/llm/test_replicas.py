"""Several servers of one model, and how many requests each has in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from aiohttp import web

from persyn.errors import AccountError, EngineError, OutageError
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result, Sampling
from persyn.llm.teachers import chat_server
from persyn.llm.teachers.concurrency import Concurrency
from tests.chat_server import Server, completion, error, token_bucket

Connect = Callable[..., chat_server.ChatServerEngine]


@pytest.fixture
def two() -> Iterator[tuple[Server, Server]]:
    with Server.running() as one, Server.running() as other:
        yield one, other


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Create engines of several servers, closed after the test."""
    with ExitStack() as over:

        def make(*servers: Server | str, **options: Any) -> chat_server.ChatServerEngine:
            urls = [server if isinstance(server, str) else server.base_url for server in servers]
            spec = ModelSpec("openai", "m", options={"base_url": urls, **options})
            engine = chat_server.load(spec, lambda: None)
            assert isinstance(engine, chat_server.ChatServerEngine)
            over.callback(engine.close)
            return engine

        yield make


def ask(n: int, text: str | None = None) -> Generate:
    return Generate(n, [{"role": "user", "content": text or str(n)}], Sampling(), seed=5)


def answer(engine: chat_server.ChatServerEngine, *requests: Generate) -> list[Result]:
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


def after(seconds: float) -> Callable[[int], Awaitable[web.StreamResponse]]:
    async def reply(n: int) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return completion("Four.")

    return reply


def asked(server: Server) -> list[str]:
    """The prompts that a server was sent, without probes."""
    texts = [body["messages"][-1]["content"] for body in server.bodies]
    return [text for text in texts if text != "Hello!"]


def test_requests_are_shared_by_how_fast_replicas_answer(two: tuple[Server, Server], connect: Connect) -> None:
    one, other = two
    one.reply, other.reply = after(0.08), after(0.24)
    engine = connect(*two, concurrency=4)

    results = answer(engine, *map(ask, range(120)))

    assert [type(result) for result in results] == [Generated] * 120
    assert engine.window == 2 * 4 * 2
    assert (one.most_in_flight, other.most_in_flight) == (4, 4)
    # Three times as fast, so it gets three quarters of 120 requests.
    assert 75 <= len(asked(one)) <= 105


def test_a_replica_that_is_down_costs_no_attempt_and_is_used_again_when_it_is_back(
    two: tuple[Server, Server], connect: Connect
) -> None:
    one, other = two
    one.reply, other.reply = after(0.02), lambda n: error(500, "broken") if n <= 4 else completion("Four.")

    results = answer(connect(*two, concurrency=2, max_retries=0), *map(ask, range(200)))

    assert [type(result) for result in results] == [Generated] * 200
    # Three failures in a row (and what was in flight then) put it aside; after a probe it answered again.
    first = [body["messages"][-1]["content"] for body in other.bodies[:7]]
    assert "Hello!" in first
    assert len(asked(other)) > 20
    assert len(asked(one)) + len(asked(other)) <= 200 + 4


def test_an_address_where_nobody_listens_is_left_out(two: tuple[Server, Server], connect: Connect) -> None:
    results = answer(connect(two[0], "http://127.0.0.1:9/v1", max_retries=0), *map(ask, range(50)))

    assert [type(result) for result in results] == [Generated] * 50
    assert sorted(map(int, asked(two[0]))) == list(range(50))


def test_only_when_all_replicas_fail_it_is_an_outage(two: tuple[Server, Server], connect: Connect) -> None:
    for server in two:
        server.reply = lambda n: error(500, "down")
    engine = connect(*two, "http://127.0.0.1:9/v1", concurrency=2, max_retries=0)

    with pytest.raises(OutageError, match=r"17 requests in a row were not answered by .*, .*: HTTP 500: down"):
        answer(engine, *map(ask, range(40)))
    assert engine.pending == 40
    with pytest.raises(OutageError, match=r"no server at http://127.0.0.1:8.*, http://127.0.0.1:9"):
        answer(connect("http://127.0.0.1:8/v1", "http://127.0.0.1:9/v1", max_retries=0), ask(1))


def test_a_prompt_that_every_replica_refuses_fails_alone(two: tuple[Server, Server], connect: Connect) -> None:
    def reply_of(server: Server) -> Callable[[int], web.Response]:
        def reply(n: int) -> web.Response:
            is_poison = server.bodies[-1]["messages"][-1]["content"] == "poison"
            return error(500, "out of memory") if is_poison else completion("Four.")

        return reply

    for server in two:
        server.reply = reply_of(server)

    found = {r.id: r for r in answer(connect(*two, max_retries=1), ask(0, "poison"), *map(ask, range(1, 20)))}

    assert found.pop(0) == Failed(0, "server_error: HTTP 500: out of memory")
    assert {type(result) for result in found.values()} == {Generated}


def test_a_replica_without_the_model_fails_no_prompt(two: tuple[Server, Server], connect: Connect) -> None:
    two[1].reply = lambda n: error(404, "The model `m` does not exist")

    results = answer(connect(*two, concurrency=4, max_retries=0), *map(ask, range(60)))

    assert [type(result) for result in results] == [Generated] * 60
    two[0].reply = two[1].reply
    with pytest.raises(AccountError, match="The model `m` does not exist"):
        answer(connect(*two, concurrency=4), *map(ask, range(60)))


def test_a_replica_that_asks_for_a_pause_does_not_stop_the_other(two: tuple[Server, Server], connect: Connect) -> None:
    two[1].reply = lambda n: error(429, "slow down", **{"Retry-After": "30"})
    began = time.monotonic()

    results = answer(connect(*two, concurrency=2), *map(ask, range(40)))

    assert [type(result) for result in results] == [Generated] * 40
    assert time.monotonic() - began < 5
    assert len(two[1].bodies) == 2


@pytest.mark.parametrize("urls", [[], ["http://a/v1", "http://a/v1"]])
def test_a_list_of_addresses_names_each_once(connect: Connect, urls: list[str]) -> None:
    with pytest.raises(EngineError, match="one or more different URLs"):
        connect(*urls)


def test_the_limit_falls_with_each_round_that_meets_an_overload_and_rises_again() -> None:
    places = Concurrency(20)
    for _ in range(8):
        places.answered(sent_at=0, now=1, tokens=None)
    places.overloaded(sent_at=1, now=2)
    assert places.limit == 18  # one of ten: a tenth less
    places.overloaded(sent_at=1.5, now=2.1)  # sent before the decrease: the same overload
    places.overloaded(sent_at=2.2, now=2.3)  # nothing was answered since: an outage
    assert places.limit == 18
    places.answered(sent_at=1, now=2.4, tokens=None)
    places.overloaded(sent_at=2.5, now=2.6)
    assert places.limit == 11  # three of four: 3/8 off 18 + 1 / 18
    for n in range(60):
        places.answered(sent_at=n, now=n + 1, tokens=10)
    assert places.limit == 20


def test_answers_twice_as_slow_per_token_as_usual_are_an_overload() -> None:
    places = Concurrency(20)
    for tokens in (100, 300):
        for _ in range(60):  # three rounds of 20, each token in a hundredth of a second
            places.answered(sent_at=0, now=tokens / 100, tokens=tokens)
    assert places.limit == 20
    for _ in range(20):
        places.answered(sent_at=0, now=2.1, tokens=100)
    assert places.limit == 18


def test_a_storm_of_rate_limits_fails_no_row_however_few_retries(two: tuple[Server, Server], connect: Connect) -> None:
    server = two[0]
    server.reply = token_bucket(per_second=100, burst=25, seconds=0.05)

    results = answer(connect(server, concurrency=32, max_retries=1), *map(ask, range(150)))

    assert [type(result) for result in results] == [Generated] * 150
    assert len(server.bodies) > 150 + 32
