"""Teachers of providers that litellm speaks to, against a scripted server on loopback."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from persyn.config import TeacherTable
from persyn.errors import AccountError, EngineError, HostLacks, OutageError, PermanentError
from persyn.ingest import versions
from persyn.llm import engines, litellm_prices
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result, Sampling
from persyn.runs.checks import servers
from tests.chat_server import Server, completion, error

KEY = "sk-very-secret"
STUB = Path(__file__).parent.parent / "litellm_stub"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:litellm", "ignore::DeprecationWarning:pydantic")


@pytest.fixture(scope="module", autouse=True)
def litellm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("litellm") is None:
            patch.syspath_prepend(STUB)
        litellm_prices._table.cache_clear()
        yield
    litellm_prices._table.cache_clear()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


Connect = Callable[..., Any]


@pytest.fixture
def connect(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Create engines, closed after the test."""
    monkeypatch.setenv("MY_KEY", KEY)
    made: list[Any] = []

    def make(model: str = "openai/m", **given: Any) -> Any:
        chosen = {"base_url": server.base_url, "api_key_env": "MY_KEY", **given}
        made.append(engines.load(ModelSpec("litellm", model, options=chosen), lambda: None))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def ask(request_id: int = 1, **sampling: Any) -> Generate:
    return Generate(request_id, [{"role": "user", "content": "2+2?"}], Sampling(**sampling), seed=5)


def answer(engine: Any, *requests: Generate) -> list[Result]:
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return sorted(results, key=lambda result: result.id)


def test_a_request_carries_its_sampling_and_key_and_the_answer_comes_back(server: Server, connect: Connect) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    server.reply = lambda n: completion("Four.", usage=usage)
    engine = connect(extra={"service_tier": "flex"})

    (result,) = answer(engine, ask(temperature=0.5, max_tokens=7, stop=["x"]))

    assert isinstance(result, Generated)
    assert (result.text, result.prompt_tokens, result.response_tokens) == ("Four.", 3, 4)
    (body,) = server.bodies
    assert {"model": "m", "seed": 5, "temperature": 0.5, "max_tokens": 7, "stop": ["x"]}.items() <= body.items()
    assert body["service_tier"] == "flex"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert engine.version.startswith("litellm ")
    assert engine.version.endswith(" openai")


def test_reasoning_and_tool_calls_come_back(server: Server, connect: Connect) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    message = {"role": "assistant", "content": "Wait.", "reasoning_content": "Sum.", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    server.reply = lambda n: web.json_response({"id": "x", "choices": [choice]})

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert (result.text, result.reasoning) == ("Wait.", "Sum.")
    assert result.tool_calls is not None
    assert result.tool_calls[0]["function"]["name"] == "add"


def test_a_response_that_was_broken_off_is_asked_for_again(server: Server, connect: Connect) -> None:
    server.reply = lambda n: completion("Fo", "abort") if n == 1 else completion("Four.")

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert result.text == "Four."


def test_a_rate_limit_is_waited_for_and_a_long_prompt_fails_alone(server: Server, connect: Connect) -> None:
    def reply(n: int) -> web.Response:
        if n == 1:
            return error(429, "slow down", **{"Retry-After": "0.3"})
        return error(400, "This model's maximum context length is 8 tokens") if n == 2 else completion("Four.")

    server.reply = reply
    results = answer(connect(concurrency=1), ask(1), ask(2))

    failed, generated = sorted(results, key=lambda result: isinstance(result, Generated))
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("too_long: ")
    assert isinstance(generated, Generated)
    assert server.at[1] - server.at[0] >= 0.3


def test_a_wrong_key_ends_the_engine_without_being_told(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(401, f"there is no key {KEY}")

    with pytest.raises(
        AccountError, match=r"there is no key \[key\]; check base_url, .*'openai/m' and the key in MY_KEY"
    ):
        answer(connect(), ask())
    assert len(server.bodies) == 1


def test_a_provider_that_fails_or_does_not_answer_is_an_outage(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(503, "busy")

    with pytest.raises(OutageError, match="HTTP 503: busy"):
        answer(connect(max_retries=0), ask())


def test_what_the_provider_lacks_is_an_error_and_only_a_seed_is_left_out(server: Server, connect: Connect) -> None:
    with pytest.raises(AccountError, match=r"openai does not support parameters: .'thinking'"):
        answer(connect(max_retries=0), *(ask(n, max_reasoning_tokens=9) for n in range(17)))

    assert server.bodies == []
    seedless = connect("anthropic/claude-sonnet-4-5")._client._arguments(ask(max_reasoning_tokens=9))
    assert "seed" not in seedless
    assert seedless["thinking"] == {"type": "enabled", "budget_tokens": 9}


def test_a_bad_model_key_or_option_is_told_at_once(connect: Connect) -> None:
    with pytest.raises(PermanentError, match="knows no provider for the model 'nonsense'; give it as provider/model"):
        connect("nonsense")
    with pytest.raises(HostLacks, match="NO_SUCH_KEY is not set"):
        connect(api_key_env="NO_SUCH_KEY")
    with pytest.raises(EngineError, match="extra contains 'num_retries'"):
        connect(extra={"num_retries": 3})
    with pytest.raises(EngineError, match="extra contains 'vertex_credentials'"):
        connect(extra={"vertex_credentials": "{}"})


def test_a_check_names_where_the_key_comes_from() -> None:
    finding = servers.seen(ModelSpec("litellm", "anthropic/claude-sonnet-4-5"))

    assert finding.level == "ok"
    assert "the provider will receive requests for 'anthropic/claude-sonnet-4-5' with the key in the" in finding.message


def test_a_teacher_without_prices_costs_what_litellm_lists() -> None:
    def prices(model: str, **own: float) -> dict[str, float | None]:
        table = {"name": "t", "model": model, "engine": "litellm", "sampling": {}, **own}
        return versions.prices(msgspec.convert(table, TeacherTable))

    assert prices("anthropic/claude-sonnet-4-5") == {"price_in": 3.0, "price_out": 15.0}
    assert prices("anthropic/claude-sonnet-4-5", price_in=0, price_out=2) == {"price_in": 0, "price_out": 2}
    assert prices("gemini/gemini-2.5-pro", price_out=2) == {"price_in": 1.25, "price_out": 2}
    assert prices("gemini/claude-sonnet-4-5") == {"price_in": None, "price_out": None}
