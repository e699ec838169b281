"""Reasoning in the answers of a chat completions server, in the forms that servers use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from persyn.errors import EngineError
from persyn.llm import options
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec, Result, Sampling
from persyn.llm.teachers import chat_completions

URL = {"base_url": "http://127.0.0.1:1/v1"}


def read(message: dict[str, Any], finish: str = "stop", inline: str = "auto", **more: Any) -> Result:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return chat_completions.read(1, json.dumps({"choices": [choice], **more}), {}, 0.0, inline)


def generated(found: Result) -> Generated:
    assert isinstance(found, Generated), found
    return found


def body(how: dict[str, Any], **given: Any) -> dict[str, Any]:
    chosen = options.decode(ModelSpec("openai", "m", options=URL | given), options.OpenAIOptions)
    request = Generate(1, [{"role": "user", "content": "2+2?"}], Sampling(**how), seed=5)
    found: dict[str, Any] = json.loads(chat_completions.body("m", request, chosen))
    return found


APART = {
    "vllm": {"reasoning": "We add.", "content": "Four."},
    "vllm before 0.12, deepseek, sglang": {"reasoning_content": "\nWe add.\n", "content": "Four."},
    "both names": {"reasoning": "We add.", "reasoning_content": "We add.", "content": "Four."},
    "one name is empty": {"reasoning_content": None, "reasoning": "We add.", "content": "Four."},
    "openrouter": {
        "content": "Four.",
        "reasoning_details": [
            {"type": "reasoning.text", "text": "We "},
            {"type": "reasoning.summary", "summary": "add."},
        ],
    },
    "mistral": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "We "}, {"type": "text", "text": "add."}]},
            {"type": "text", "text": "Four."},
        ]
    },
    "anthropic": {"content": [{"type": "thinking", "thinking": "We add."}, {"type": "text", "text": "Four."}]},
    "parts named reasoning": {"content": [{"type": "reasoning", "text": "We add."}, {"text": "Four."}]},
    "a list of texts": {"reasoning_content": ["We ", "add."], "content": "Four."},
    "within the text": {"content": "<think>\nWe add.\n</think>\n\nFour."},
    "within the text, opened by the template": {"content": "We add.\n</think>\n\nFour."},
}


@pytest.mark.parametrize("message", APART.values(), ids=APART)
def test_reasoning_is_found_in_whatever_form_a_server_reports_it(message: dict[str, Any]) -> None:
    found = generated(read(message))

    assert (found.reasoning, found.text) == ("We add.", "Four.")


def test_a_text_is_kept_as_it_is_if_the_run_says_so() -> None:
    text = "<think>We add.</think>Four."

    kept = generated(read({"content": text}, inline="off"))
    opened = generated(read({"content": "We add </think> Four."}, inline="opened"))

    assert (kept.reasoning, kept.text) == (None, text)
    assert (opened.reasoning, opened.text) == ("We add", "Four.")


def test_a_text_beside_reasoning_is_not_searched_for_more() -> None:
    found = generated(read({"reasoning": "We add.", "content": "<think>a</think>"}))

    assert (found.reasoning, found.text) == ("We add.", "<think>a</think>")


@pytest.mark.parametrize(
    ("message", "inline"),
    [
        ({"reasoning": "We add", "content": None}, "auto"),
        ({"reasoning_content": "We add", "content": ""}, "auto"),
        ({"content": [{"type": "thinking", "thinking": "We add"}]}, "auto"),
        ({"content": "<think>We add"}, "auto"),
        ({"content": "We add"}, "opened"),
    ],
)
def test_reasoning_that_was_cut_is_no_answer(message: dict[str, Any], inline: str) -> None:
    usage = {"completion_tokens": 1024}
    found = read(message, "length", inline, usage=usage)

    assert isinstance(found, Failed)
    assert found.reason == (
        "unfinished_reasoning: 1,024 tokens of reasoning and no answer, finish reason length; "
        "raise max_tokens, or set max_reasoning_tokens"
    )


def test_a_server_that_counts_nothing_is_told_by_characters() -> None:
    found = read({"reasoning": "We add", "content": ""}, "length")

    assert isinstance(found, Failed)
    assert found.reason.startswith("unfinished_reasoning: 6 characters of reasoning")


def test_reasoning_is_read_from_a_stream() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "reasoning_content": None},
        {"reasoning_content": "We", "reasoning": "We"},
        {"reasoning_content": "\n\n"},
        {"reasoning": "add."},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": " Yes."}]}]},
        {"content": "Four."},
    ]
    pieces = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 9}}
    stream = "\n\n".join(f"data: {json.dumps(piece)}" for piece in [*pieces, last])

    found = generated(chat_completions.read(1, f"{stream}\n\ndata: [DONE]\n\n", {}, 0.0))

    assert (found.reasoning, found.text, found.response_tokens) == ("We\n\nadd. Yes.", "Four.", 9)


@pytest.mark.parametrize(
    ("usage", "reasons", "counts"),
    [
        ({"completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 12}}, True, (20, 12)),
        ({"completion_tokens": 20}, True, (20, None)),
        # A server whose parser counts nothing says 0.
        ({"completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 0}}, True, (20, None)),
        ({"completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 0}}, False, (20, 0)),
        # The reasoning is billed although it is not shown.
        ({"completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 12}}, False, (20, 12)),
        ({"completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 21}}, True, (20, None)),
        ({"completion_tokens": 20, "completion_tokens_details": None}, True, (20, None)),
        (
            {
                "prompt_tokens": 7,
                "completion_tokens": 20,
                "total_tokens": 127,
                "completion_tokens_details": {"reasoning_tokens": 100},
            },
            True,
            (120, 100),
        ),
    ],
)
def test_tokens_are_counted_as_the_server_says_if_it_can_be_believed(
    usage: dict[str, Any], reasons: bool, counts: tuple[int | None, int | None]
) -> None:
    found = generated(read({"content": "Four.", "reasoning": "We add." if reasons else None}, usage=usage))

    assert (found.response_tokens, found.reasoning_tokens) == counts


def test_the_controls_are_sent_when_they_are_set() -> None:
    assert body({}).keys().isdisjoint({"reasoning_effort", "thinking_token_budget", "chat_template_kwargs"})

    sent = body({"reasoning_effort": "low", "max_reasoning_tokens": 0}, chat_template_kwargs={"enable_thinking": False})

    assert sent["reasoning_effort"] == "low"
    assert sent["thinking_token_budget"] == 0
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert body({"reasoning_effort": "low"}, extra={"reasoning_effort": "high"})["reasoning_effort"] == "high"


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "add_generation_prompt", "chat_template"])
@pytest.mark.parametrize("kind", [options.OpenAIOptions, options.VllmOptions, options.TransformersOptions])
def test_a_variable_that_persyn_sets_itself_is_refused(name: str, kind: Any) -> None:
    given = {"chat_template_kwargs": {name: 1}} | (URL if kind is options.OpenAIOptions else {})

    with pytest.raises(EngineError, match=f"chat_template_kwargs contains '{name}', which PerSyn sets itself"):
        options.decode(ModelSpec("x", "m", options=given), kind)


def test_nothing_that_no_database_holds_is_left_in_reasoning_or_calls() -> None:
    found = generated(read({"content": "a\0", "reasoning": "b\0\ud83d"}))

    assert (found.text, found.reasoning) == ("a\N{REPLACEMENT CHARACTER}", "b" + 2 * "\N{REPLACEMENT CHARACTER}")
