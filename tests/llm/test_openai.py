"""The client of chat completions against a scripted server on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from persyn.errors import AccountError, EngineError, OutageError
from persyn.llm.host import Host
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result, Sampling
from persyn.llm.teachers import addresses, chat_completions, chat_server
from persyn.llm.teachers.complaints import RetryableError
from tests.chat_server import Server, completion, error

KEY = "sk-very-secret"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


Connect = Callable[..., chat_server.ChatServerEngine]


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    """Create engines, closed after the test."""
    made: list[chat_server.ChatServerEngine] = []

    def make(**options: Any) -> chat_server.ChatServerEngine:
        engine = chat_server.load(
            ModelSpec("openai", "m", options={"base_url": server.base_url, **options}), lambda: None
        )
        assert isinstance(engine, chat_server.ChatServerEngine)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def ask(request_id: int = 1, text: str = "2+2?", **sampling: Any) -> Generate:
    return Generate(request_id, [{"role": "user", "content": text}], Sampling(**sampling), seed=5)


def answer(engine: chat_server.OpenAI, *requests: Generate) -> list[Result]:
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

    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    detection = {"max_pattern_size": 20, "min_count": 4, "min_pattern_size": 1}

    answer(engine, ask(**penalties, top_k=5, min_p=0.1, repetition_detection=detection, max_tokens=7))

    body = server.bodies[0]
    assert {name: body[name] for name in penalties} == penalties
    assert (body["top_k"], body["min_p"], body["max_completion_tokens"]) == (5, 0.1, 7)
    assert body["repetition_detection"] == detection
    assert (body["reasoning_effort"], body["seed"]) == ("low", 1)
    assert "max_tokens" not in body


def test_a_response_that_a_server_ended_for_repeating_itself_is_a_failure(server: Server, connect: Connect) -> None:
    server.reply = lambda n: completion("Fo fo fo fo", "repetition", usage={"completion_tokens": 8})

    (result,) = answer(connect(), ask())

    assert reason(result) == "repetition: the response repeats itself after 8 tokens"


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
    with pytest.raises(EngineError, match="PERSYN_NO_SUCH_KEY is not set or is empty"):
        connect(api_key_env="PERSYN_NO_SUCH_KEY")
    with pytest.raises(EngineError, match="localhost:8000"):
        connect(base_url="localhost:8000/v1")
    with pytest.raises(EngineError, match="base_url"):
        chat_server.load(ModelSpec("openai", "m"), lambda: None)


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
    # One slot is occupied for 0.6 s; the two others serve the other 19 meanwhile.
    assert time.monotonic() - began < 1.2


def test_too_many_requests_are_asked_again_when_the_server_says(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(429, "slow down", **{"Retry-After": "1"}) if n == 1 else completion("Four.")

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert len(server.bodies) == 2
    assert server.at[1] - server.at[0] >= 1.0
    assert result.seconds >= 1.0


STREAM, DONE = 'data: {"choices": [{"delta": {"content": "Fo"}}]}\n\n', "\ndata: [DONE]\n\n"
#: Replies with HTTP 200 but without a response, and what the error must quote from them.
FAULTY = {
    "an error": ('{"error": {"message": "overloaded", "code": 502}}', "overloaded"),
    "an error in words": ('{"error": "Unexpected endpoint"}', "Unexpected endpoint"),
    "an error in a list": ('[{"error": {"message": "quota of a minute", "code": 429}}]', "quota of a minute"),
    "an error beside choices": ('{"choices": [{"message": {"content": "A"}}], "error": {"message": "no"}}', "no"),
    "choices null": ('{"choices": null, "detail": "worker lost"}', "worker lost"),
    "no choices": ('{"choices": []}', "choices"),
    "a choice that is null": ('{"choices": [null]}', "choices"),
    "a message that is null": ('{"choices": [{"message": null, "finish_reason": "stop"}]}', "finish_reason"),
    "neither text nor reason": ('{"choices": [{"message": {}}]}', "neither a text nor a finish reason"),
    "an error in the choice": (
        '{"choices": [{"message": {"content": "Fo"}, "finish_reason": "error", "error": "upstream died"}]}',
        "upstream died",
    ),
    "a page": ("<html><body>Too long a queue: maximum context of this page</body></html>", "<html><body>Too long"),
    "nothing": ("", "nothing"),
    "null": ("null", "null"),
    "a number": ("7", "7"),
    "a list without end": ("[" * 100_000, "[[["),
    "cut off": ('{"choices": [{"message": {"content": "The context window is too long', "The context window"),
    "a stream that broke off": ('data: {"choices": [{"delta": {"content": "Fo"}}]}\n\n', "Fo"),
    "a stream with an error": ('data: {"choices": []}\n\ndata: {"error": {"message": "midway"}}\n\n', "midway"),
    "a stream of something else": ("data: [1]\n\ndata: null\n\n", "null"),
    "cancelled": ('{"choices": [{"message": {"content": "Fo"}, "finish_reason": "abort"}]}', "abort"),
    "no resources": (
        '{"choices": [{"message": {"content": "Fo"}, "finish_reason": "insufficient_system_resource"}]}',
        "insufficient_system_resource",
    ),
}


#: More such replies, which need no server.
MORE_FAULTY = {
    "an error in the message": (
        '{"choices": [{"message": {"content": "Fo", "error": "upstream died"}, "finish_reason": "stop"}]}',
        "upstream died",
    ),
    "an error beside its name": ('{"error": "Bad Gateway", "message": "no worker"}', "Bad Gateway: no worker"),
    "an error that is true": ('{"error": true, "message": "no worker"}', "no worker"),
    "an error of its own form": ('{"base_resp": {"status_code": 1001, "status_msg": "late"}}', "answer: late"),
    "a refused connection": ('{"error": {"code": "ECONNREFUSED", "message": "upstream"}}', "upstream"),
    "a long queue": ('{"error": {"code": 503, "message": "request queue too long"}}', "request queue too long"),
    "a text alone": ('{"choices": [{"text": "reduce the length of it"}]}', "no chat completion"),
    "a stream with an error event": (
        STREAM + 'event: error\ndata: {"message": "midway", "code": 500}\n' + DONE,
        "midway",
    ),
    "a stream with an event of words": (STREAM + "event: error\ndata: midway\n" + DONE, "midway"),
    "a stream with an error field": (STREAM + 'error: {"code": 500, "message": "midway"}\n' + DONE, "midway"),
    "a stream with an error object": (STREAM + 'data: {"object": "error", "message": "midway"}\n' + DONE, "midway"),
    "a stream with a detail": (STREAM + 'data: {"detail": "midway"}\n' + DONE, "midway"),
    "a stream cut after empty reasons": (
        'data: {"choices": [{"delta": {"content": "Fo"}, "finish_reason": ""}]}\n\n',
        "Fo",
    ),
    "a stream cut after null in words": (
        'data: {"choices": [{"delta": {"content": "Fo"}, "finish_reason": "null"}]}\n\n',
        "Fo",
    ),
    **{
        said: (f'{{"choices": [{{"message": {{"content": "Fo"}}, "finish_reason": "{said}"}}]}}', said)
        for said in ("network_error", "disconnected", "deadline_exceeded", "out_of_memory", "preempted")
    },
}


@pytest.mark.parametrize(("body", "said"), FAULTY.values(), ids=FAULTY)
def test_an_answer_without_a_response_is_asked_for_again_and_an_outage_if_it_goes_on(
    server: Server, connect: Connect, body: str, said: str
) -> None:
    server.reply = lambda n: web.Response(text=body) if n == 1 else completion("Four.")
    (result,) = answer(connect(), ask())
    assert isinstance(result, Generated)
    assert (result.text, len(server.bodies)) == ("Four.", 2)

    server.reply = lambda n: web.Response(text=body)
    with pytest.raises(OutageError) as outage:
        answer(connect(max_retries=0), ask(1), ask(2), ask(3))
    assert said in str(outage.value)


@pytest.mark.parametrize(("body", "said"), MORE_FAULTY.values(), ids=MORE_FAULTY)
def test_an_answer_that_breaks_off_or_complains_is_no_response(body: str, said: str) -> None:
    with pytest.raises(RetryableError, match=re.escape(said)):
        chat_completions.read(1, body, {}, 0.1)


def test_an_answer_that_is_shorter_than_announced_is_asked_for_again(server: Server, connect: Connect) -> None:
    async def cut(n: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "500"})
        await response.prepare(server.requests[-1])
        await response.write(b'{"choices": [{"message": {"content": "Fo')
        assert server.requests[-1].transport is not None
        server.requests[-1].transport.close()
        return response

    server.reply = lambda n: cut(n) if n == 1 else completion("Four.")

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert (result.text, len(server.bodies)) == ("Four.", 2)


def test_every_other_answer_faulty_costs_no_row(server: Server, connect: Connect) -> None:
    server.reply = lambda n: web.Response(text='{"error": {"message": "again"}}') if n % 2 else completion("Four.")

    results = answer(connect(concurrency=4), *[ask(i) for i in range(12)])

    assert [type(result) for result in results] == [Generated] * 12


def test_a_server_error_is_asked_again_and_then_an_outage(server: Server, connect: Connect) -> None:
    server.reply = lambda n: web.Response(status=500, text="<html>" + "x" * 500)

    with pytest.raises(OutageError, match=r"1 request in a row were not answered by .*: HTTP 500: <html>xxx") as outage:
        answer(connect(max_retries=1), ask())

    assert len(str(outage.value)) < 400
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["2+2?", "2+2?", "Hello!"]


def test_a_request_that_alone_is_never_answered_fails_and_no_other(server: Server, connect: Connect) -> None:
    def reply(n: int) -> web.Response:
        is_poison = server.bodies[-1]["messages"][-1]["content"] == "poison"
        return error(500, "out of memory") if is_poison else completion("Four.")

    server.reply = reply

    (alone,) = answer(connect(max_retries=1), ask(1, "poison"))
    found = {result.id: result for result in answer(connect(max_retries=1), ask(1, "poison"), ask(2), ask(3))}

    assert reason(alone) == reason(found[1]) == "server_error: HTTP 500: out of memory"
    assert isinstance(found[2], Generated)
    assert isinstance(found[3], Generated)


def test_an_answer_that_takes_too_long_is_an_outage(server: Server, connect: Connect) -> None:
    async def sleep(n: int) -> web.Response:
        await asyncio.sleep(5)
        return completion("late")

    server.reply = sleep

    with pytest.raises(OutageError, match=r"no answer within 0\.2 s"):
        answer(connect(timeout_seconds=0.2, max_retries=0), ask())


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        *[(word, "stop") for word in ("stop", "STOP", "end_turn", "stop_sequence", "eos_token", "eos")],
        *[(word, "stop") for word in ("FinishReason.STOP", "stop_str", "endTurn", "completed")],
        *[(word, "length") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens")],
        *[(word, "length") for word in ("FINISH_REASON_MAX_TOKENS", "maxTokens", "max_new_tokens", "token limit")],
        *[(word, "length") for word in ("context_length_exceeded", "truncated", "model_context_window_exceeded")],
        *[(word, word) for word in ("tool_calls", "function_call", "OTHER", "Weird Reason")],
        *[
            (word, word)
            for word in ("load", "unknown", "MALFORMED_FUNCTION_CALL", "LANGUAGE", "time_limit", "max_turns")
        ],
        (None, None),
        ("", None),
        ("null", None),
        ([], None),
        (3, "3"),
    ],
)
def test_a_finish_reason_is_stop_or_length_or_stored_as_it_is(
    server: Server, connect: Connect, said: Any, stored: str | None
) -> None:
    server.reply = lambda n: completion("Four.", said)

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert result.finish_reason == stored


@pytest.mark.parametrize("said", ["sensitive", "SAFETY", "RECITATION", "PROHIBITED_CONTENT", "refusal", "guardrail"])
def test_a_response_that_a_filter_ended_is_refused(server: Server, connect: Connect, said: str) -> None:
    server.reply = lambda n: completion("Fo", said)

    (result,) = answer(connect(), ask())

    assert reason(result) == f"refused: finish reason {said}"


@pytest.mark.parametrize(
    "more", [{"tool_calls": [{"id": "a", "function": {"name": "f"}}]}, {"function_call": {"name": "f"}}]
)
def test_a_text_beside_a_call_of_a_tool_did_not_stop(server: Server, connect: Connect, more: dict[str, Any]) -> None:
    choice = {"message": {"content": "Let me see.", **more}, "finish_reason": "stop"}
    server.reply = lambda n: web.json_response({"choices": [choice]})

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert result.finish_reason == "tool_calls"


@pytest.mark.parametrize("error", [{"message": None, "code": None}, {"code": 0, "message": ""}, {}, "", False])
def test_an_error_that_says_nothing_costs_nothing(server: Server, connect: Connect, error: Any) -> None:
    server.reply = lambda n: completion("Four.", error=error)

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)


def test_a_call_of_a_tool_is_no_response(server: Server, connect: Connect) -> None:
    server.reply = lambda n: completion(None, "tool_calls")

    (result,) = answer(connect(), ask())

    assert reason(result) == "empty: no text, finish reason tool_calls"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}], "Four."),
        (["Fo", {"text": "ur."}], "Four."),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, {"type": "text", "text": "4"}], "4"),
        ({"type": "text", "text": "Four."}, "Four."),
        ([{"type": "text", "text": {"value": "Four.", "annotations": []}}], "Four."),
        ([[{"type": None, "text": "Fo"}], {"type": "text", "content": "ur."}], "Four."),
        ([{"type": "reasoning", "text": "2+2"}, {"type": "markdown", "text": "4"}], "4"),
        ({"parts": [{"text": "Four."}]}, "Four."),
        (4, "4"),
        ("lone \ud83d half", "lone \N{REPLACEMENT CHARACTER} half"),
    ],
)
def test_the_text_is_kept_in_whatever_form_it_comes(server: Server, connect: Connect, content: Any, text: str) -> None:
    server.reply = lambda n: completion(content)

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert result.text == text


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 9.0, "completion_tokens": 3}, (9, 3)),
        ({"prompt_tokens": 9.5, "completion_tokens": "3"}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": 2**40}, (None, None)),
        ({"prompt_tokens": True, "completion_tokens": 0}, (None, None)),
        ({"prompt_tokens": 1e300, "completion_tokens": None}, (None, None)),
        ([9, 3], (None, None)),
        ("much", (None, None)),
    ],
)
def test_a_usage_that_cannot_be_believed_is_unknown(
    server: Server, connect: Connect, usage: Any, counts: tuple[int | None, int | None]
) -> None:
    server.reply = lambda n: completion("Four.", usage=usage)

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)
    assert (result.prompt_tokens, result.response_tokens) == counts


def test_a_refusal_that_is_none_costs_nothing(server: Server, connect: Connect) -> None:
    message = {"content": "Four.", "refusal": False}
    server.reply = lambda n: web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)


@pytest.mark.parametrize(
    ("status", "expected"), [(200, None), (400, "refused: HTTP 400: caf\N{REPLACEMENT CHARACTER}")]
)
def test_a_body_that_is_no_utf_8_is_read_as_well_as_can_be(
    server: Server, connect: Connect, status: int, expected: str | None
) -> None:
    body = (
        b'{"choices": [{"message": {"content": "caf\xe9"}, "finish_reason": "stop"}]}' if status == 200 else b"caf\xe9"
    )
    server.reply = lambda n: web.Response(body=body, status=status)

    (result,) = answer(connect(), ask())

    if expected is not None:
        assert reason(result) == expected
        return
    assert isinstance(result, Generated)
    assert result.text == "caf\N{REPLACEMENT CHARACTER}"


def test_a_server_error_that_is_no_utf_8_is_an_outage_and_no_death(server: Server, connect: Connect) -> None:
    server.reply = lambda n: web.Response(body=b"caf\xe9", status=500)

    with pytest.raises(OutageError, match="HTTP 500: caf"):
        answer(connect(max_retries=0), ask())


def test_a_server_that_only_streams_is_read(server: Server, connect: Connect) -> None:
    pieces = [
        ": OPENROUTER PROCESSING",
        'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}',
        'data: {"choices": [{"index": 0, "delta": {"content": "Fo"}}, {"index": 1, "delta": {"content": "?"}}]}',
        'data: {"choices": [{"index": 0, "delta": {"content": "ur.\u2028"}, "finish_reason": "length"}]}',
        'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}',
        "data: [DONE]",
    ]
    server.reply = lambda n: web.Response(text="\r\n\r\n".join(pieces), content_type="text/event-stream")

    (result,) = answer(connect(extra={"stream": True}), ask())

    assert isinstance(result, Generated)
    assert (result.text, result.finish_reason) == ("Four.", "length")
    assert (result.prompt_tokens, result.response_tokens) == (9, 3)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("Fo", "content_filter"), "refused: content filter"),
        (error(400, "This model's maximum context length is 8192 tokens. However, you requested"), "too_long: This"),
        (error(422, "the request exceeds the available context size"), "too_long: the request"),
        (error(400, "Unknown role"), "refused: HTTP 400: Unknown role"),
        (web.json_response({"detail": [{"msg": "no"}]}, status=422), 'refused: HTTP 422: [{"msg":"no"}]'),
        (
            error(400, "max_tokens is too large: 50000. This model supports at most 4096 completion tokens"),
            "refused: HTTP 400: max_tokens is too large",
        ),
        (
            error(400, "`max_tokens` must be at most `8192`, less than the `context_window` of this model"),
            "refused: HTTP 400: `max_tokens` must",
        ),
        (
            error(400, "too many tokens: max tokens must be at most 4096, the maximum output"),
            "refused: HTTP 400: too many",
        ),
        (
            error(400, "'max_tokens' is too large: 5000. This model's maximum context length is 4096 and your input"),
            "refused: HTTP 400: 'max_tokens'",
        ),
        (
            error(400, "'max_tokens' is too large: 900. This model's maximum context length is 4096 and your input"),
            "too_long: 'max_tokens'",
        ),
        (error(400, "Input length 5000 exceeds the maximum allowed length 4096"), "too_long: Input"),
        (error(400, "Your request exceeded model token limit: 8192"), "too_long: Your"),
        (error(400, "Model 'm' is too large to load"), "refused: HTTP 400: Model"),
        (error(400, "API key not valid for this"), "refused: HTTP 400: API key"),
        (
            web.json_response({"detail": [{"msg": "no", "input": "My account balance is insufficient"}]}, status=422),
            "refused: HTTP 422: [",
        ),
        (
            web.json_response({"error": {"code": "account_blocked", "message": "no"}}, status=403),
            "refused: HTTP 403: no",
        ),
        (
            web.json_response({"error": "Bad Request", "message": "prompt too long"}, status=400),
            "too_long: Bad Request: pr",
        ),
        (error(400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"), "too_long: input"),
        (error(400, "The input token count (1200000) exceeds the maximum"), "too_long: The input"),
        (error(400, "Stream must be set to true"), "refused: HTTP 400: Stream must"),
        (error(403, "your prompt was flagged"), "refused: HTTP 403: your prompt was flagged"),
        (error(404, "No endpoints found that support this"), "refused: HTTP 404: No endpoints"),
        (error(451, "not here"), "refused: HTTP 451: not here"),
        (web.json_response({"error": {"code": 403, "message": "flagged"}}), "refused: HTTP 403: flagged"),
        (web.json_response({"error": {"code": "content_filter", "message": "no"}}), "refused: no"),
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


@pytest.mark.parametrize("status", [401, 403, 404, 410, 307])
def test_a_wrong_key_model_or_address_ends_the_engine(server: Server, connect: Connect, status: int) -> None:
    server.reply = lambda n: error(status, "no such thing", Location="http://127.0.0.1:1/")

    with pytest.raises(AccountError, match=f"HTTP {status}: no such thing; check base_url, the model 'm'"):
        answer(connect(), ask())


QUOTA = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}


@pytest.mark.parametrize(
    "reply",
    [
        error(402, "Insufficient credits"),
        error(405, "Method Not Allowed"),
        error(498, "token expired"),
        web.json_response({"error": QUOTA}, status=429),
        error(429, "You exceeded your current quota, please check your plan and billing details."),
        error(400, "Your credit balance is too low to access the API"),
        error(403, "Sorry, your account balance is insufficient"),
        error(429, "Key limit exceeded (total limit)"),
        error(429, "Monthly spend limit reached"),
        error(400, "API key not valid. Please pass a valid API key."),
        error(400, "Model Not Exist"),
        web.json_response({"error": {"message": "Incorrect key", "code": "invalid_api_key"}}),
        web.json_response({"error": {"message": "no", "code": "account_blocked"}}, status=403),
        web.json_response({"code": 1008, "error_msg": "insufficient balance"}),
        web.json_response({"error": {"message": "Insufficient credits", "code": 402}}),
        web.json_response({"error": {"message": "User not found.", "code": 401}}),
    ],
)
def test_an_account_that_is_locked_or_empty_ends_the_engine_and_fails_no_prompt(
    server: Server, connect: Connect, reply: web.Response
) -> None:
    # A response object can be sent only once.
    server.reply = lambda n: completion("Four.") if n == 1 else web.Response(body=reply.body, status=reply.status)
    engine = connect(concurrency=1)

    with pytest.raises(AccountError, match="that the account may use them"):
        answer(engine, *[ask(i) for i in range(40)])

    assert engine.pending == 39


def test_a_limit_of_requests_per_minute_is_no_empty_account(server: Server, connect: Connect) -> None:
    said = "You exceeded your current quota, please check your plan and billing details. Please retry in 34s."
    server.reply = lambda n: error(429, said) if n == 1 else completion("Four.")

    (result,) = answer(connect(), ask())

    assert isinstance(result, Generated)


def test_a_request_that_nobody_would_be_granted_stops_before_the_prompts_are_used_up(
    server: Server, connect: Connect
) -> None:
    server.reply = lambda n: error(400, "Unsupported parameter: max_tokens")
    engine = connect(concurrency=2)

    with pytest.raises(AccountError, match="Unsupported parameter: max_tokens"):
        answer(engine, *[ask(i) for i in range(100)])

    assert engine.pending == 100


def test_a_number_of_tokens_that_nobody_is_granted_stops_though_a_short_greeting_is_answered(
    server: Server, connect: Connect
) -> None:
    def reply(n: int) -> web.Response:
        is_much = server.bodies[-1]["max_tokens"] > 4096
        return error(400, "max_tokens is too large: 5000, at most 4096") if is_much else completion("Hi.")

    server.reply = reply

    with pytest.raises(AccountError, match="max_tokens is too large"):
        answer(connect(concurrency=2), *[ask(i, max_tokens=5000) for i in range(100)])


def test_no_server_ends_the_engine(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]

    with pytest.raises(OutageError, match=f"no server at http://127.0.0.1:{port}/v1/chat/completions"):
        answer(connect(base_url=f"http://127.0.0.1:{port}/v1", max_retries=1), ask())


def test_an_outage_ends_the_engine_and_fails_no_prompt(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(503, "down")
    engine = connect(concurrency=2, max_retries=0)

    with pytest.raises(OutageError, match="17 requests in a row were not answered"):
        answer(engine, *[ask(i) for i in range(100)])

    assert engine.pending == 100


def test_a_request_that_never_gets_an_answer_fails_when_others_do(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(503, "down") if n <= 3 else completion("here")
    engine = connect(concurrency=1, max_retries=0)

    found = {result.id: result for result in answer(engine, *[ask(i) for i in range(5)])}

    assert [isinstance(found[i], Failed) for i in range(5)] == [True] * 3 + [False] * 2


def test_a_prompt_that_met_an_outage_is_asked_again_when_it_is_over(server: Server, connect: Connect) -> None:
    server.reply = lambda n: error(503, "down") if n <= 4 else completion("here")

    results = answer(connect(concurrency=2, max_retries=1), *[ask(i) for i in range(5)])

    assert [type(result) for result in results] == [Generated] * 5


def test_the_query_of_a_base_url_is_kept_and_a_key_goes_into_the_header_that_is_asked_for(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    base_url = f"{server.base_url}?api-version=2024-10-21"

    answer(connect(base_url=base_url, api_key_env="TEACHER_KEY", api_key_header="api-key"), ask())

    assert server.requests[0].path_qs == "/v1/chat/completions?api-version=2024-10-21"
    assert server.headers[0]["api-key"] == KEY
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("key", ["sk-a\nsk-b", "sk-a\r\nX-Other: 1", "Bearer sk-a", "sk-\N{EM DASH}a", "sk-a\tb"])
def test_a_key_that_cannot_be_one_is_told_before_the_first_request(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)

    with pytest.raises(EngineError, match="TEACHER_KEY is not a single API key") as refused:
        connect(api_key_env="TEACHER_KEY")

    assert "sk-" not in str(refused.value)
    assert server.bodies == []


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "http://me:sk-secret@127.0.0.1/v1"},
        {"base_url": "http://sk-secret@127.0.0.1/v1"},
        {"base_url": "http://127.0.0.1/v1?key=sk-secret"},
        {"base_url": "http://127.0.0.1/v1?x=1&api_key=sk-secret"},
        {"base_url": "http://127.0.0.1/v1?subscription-key=sk-secret"},
        {"api_key_env": "sk-secret"},
        {"extra": {"api_key": "sk-secret"}},
        {"extra": {"extra_headers": [{"Authorization": "Bearer sk-secret"}]}},
    ],
)
def test_a_secret_among_options_is_refused_and_not_repeated(connect: Connect, options: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="environment") as refused:
        connect(**options)

    assert "sk-secret" not in str(refused.value)


def test_a_proxy_of_the_environment_is_heeded_and_its_password_told_to_nobody(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine api.example.com login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("http_proxy", server.base_url.replace("http://", "http://me:hidden@").removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "localhost,.internal")

    (result,) = answer(connect(base_url="http://api.example.com/v1", api_key_env="TEACHER_KEY"), ask())

    assert isinstance(result, Generated)
    assert server.headers[0]["Host"] == "api.example.com"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["Proxy-Authorization"].startswith("Basic ")
    assert addresses.proxy(URL("http://llm.internal/v1")) is None
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(EngineError, match="socks5 proxy"):
        connect(base_url="http://api.example.com/v1")


@pytest.mark.parametrize(
    ("base_url", "said"),
    [
        ("http://h/v1/chat/completions", "must end before /chat/completions"),
        ("http://h/v1/chat/completions/?api-version=1", "must end before /chat/completions"),
        (" http://h/v1 ", "contains white space or a #"),
        ("http://h/v1#x", "contains white space or a #"),
        ("http://h:99999/v1", "is not a valid URL"),
    ],
)
def test_a_base_url_that_cannot_be_meant_is_refused(connect: Connect, base_url: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        connect(base_url=base_url)


@pytest.mark.parametrize(
    ("no_proxy", "is_direct"),
    [
        ("llm.example.com:8000", True),
        ("llm.example.com:9000", False),
        ("*.example.com", True),
        ("example.org, .example.com", True),
        ("10.0.0.0/8", False),
    ],
)
def test_no_proxy_may_name_a_port_a_domain_or_a_network(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, is_direct: bool
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", no_proxy)

    assert (addresses.proxy(URL("http://llm.example.com:8000/v1")) is None) == is_direct
    assert (addresses.proxy(URL("http://10.1.2.3/v1")) is None) == ("/" in no_proxy)


def test_a_proxy_that_is_no_url_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:hidden@127.0.0.1:port")
    with pytest.raises(EngineError, match="that is not a URL") as refused:
        addresses.proxy(URL("http://api.example.com/v1"))
    assert "hidden" not in str(refused.value)


def receive(host: Host) -> None:
    while not host.receive(1.0):
        pass


def test_what_an_engine_raises_is_told_by_its_host(server: Server, tmp_path: Path) -> None:
    server.reply = lambda n: error(402, "Insufficient credits") if n == 1 else error(503, "down")

    for expected in (AccountError, OutageError):
        options = {"base_url": server.base_url, "max_retries": 0}
        host = Host(ModelSpec("openai", "m", options=options), tmp_path)
        try:
            host.submit([ask()])
            with pytest.raises(expected):
                receive(host)
        finally:
            host.close()
