"""Post-processing of responses before they are stored."""

from __future__ import annotations

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
