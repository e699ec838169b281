"""Post-processing of responses before they are stored."""

from __future__ import annotations

from msgspec import structs

from persyn.llm.protocols import Failed, Generated
from persyn.llm.teachers.generation import to_result


def generated(text: str) -> Generated:
    return Generated(id=1, text=text, finish_reason="stop", prompt_tokens=1, response_tokens=1, seconds=0.0)


def test_a_character_that_no_database_holds_is_replaced() -> None:
    found = to_result(generated(" a\0b "))
    assert isinstance(found, Generated)
    assert found.text == "a\N{REPLACEMENT CHARACTER}b"


def test_a_response_of_nothing_but_space_has_failed() -> None:
    assert isinstance(to_result(generated(" \n")), Failed)


def test_reasoning_and_calls_are_kept_and_cleaned() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\0"}'}}]
    before = structs.replace(generated(""), reasoning=" a\0b ", reasoning_tokens=3, tool_calls=calls)

    found = to_result(before)

    assert isinstance(found, Generated)
    assert (found.text, found.reasoning, found.reasoning_tokens) == ("", "a\N{REPLACEMENT CHARACTER}b", 3)
    assert found.tool_calls is not None
    assert found.tool_calls[0]["function"]["arguments"] == '{"a": "\N{REPLACEMENT CHARACTER}"}'


def test_reasoning_without_an_answer_is_unfinished_however_it_ended() -> None:
    found = to_result(structs.replace(generated("\n"), reasoning="a", reasoning_tokens=3))

    assert isinstance(found, Failed)
    assert found.reason == "unfinished_reasoning: 3 tokens of reasoning and no answer, finish reason stop"
