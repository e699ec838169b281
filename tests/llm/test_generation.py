"""Post-processing of responses before they are stored."""

from __future__ import annotations

import pytest
from msgspec import structs

from persyn.config import RepetitionDetection
from persyn.llm.protocols import Failed, Generated
from persyn.llm.teachers.generation import repeats
from persyn.llm.teachers.results import to_result


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


def test_a_response_that_repeats_itself_is_not_stored_as_an_answer() -> None:
    found = to_result(structs.replace(generated("yes yes yes"), finish_reason="repetition", response_tokens=1200))

    assert found == Failed(
        1, "repetition: the response repeats itself after 1,200 tokens", prompt_tokens=1, response_tokens=1200
    )


@pytest.mark.parametrize(
    ("ids", "is_repetition"),
    [
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([9, 1, 2, 1, 2], False),
        ([1, 2, 1, 2, 1, 2, 9], False),
        ([5, 5, 5], False),
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], False),
    ],
    ids=["three times", "twice", "not at the end", "a pattern that is too short", "a pattern that is too long"],
)
def test_a_repetition_is_a_pattern_of_the_sizes_asked_for(ids: list[int], is_repetition: bool) -> None:
    assert repeats(ids, RepetitionDetection(min_pattern_size=2, max_pattern_size=3, min_count=3)) == is_repetition
