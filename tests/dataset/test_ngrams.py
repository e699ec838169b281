"""The tokenisation of text for overlap checks."""

from __future__ import annotations

import pytest

from persyn.dataset.near_duplicates import NearDuplicates
from persyn.dataset.ngrams import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's a WELL-known fact: yes!", ["it", "s", "a", "well", "known", "fact", "yes"]),
        ("and/or **bold** > quote ====", ["and", "or", "bold", "quote"]),
        ("Compute 12 - 7", ["compute", "12", "-", "7"]),
        ("2-3*x=(a/b)", ["2", "-", "3", "*", "x", "=", "a", "/", "b"]),
        ("Is x > y?", ["is", "x", ">", "y"]),
        # A vowel sign belongs to its letter, and a character of a script without spaces is a word.
        ("\u0926\u093f\u0928 \u0926\u093e\u0928", ["\u0926\u093f\u0928", "\u0926\u093e\u0928"]),
        ("\u6771\u4eac", ["\u6771", "\u4eac"]),
    ],
)
def test_case_punctuation_and_layout_do_not_count_and_what_calculates_does(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_prompts_that_calculate_otherwise_are_no_near_duplicates() -> None:
    seen = NearDuplicates(1.0)
    texts = ["Compute 12 + 7", "Compute 12 - 7", "Compute 12 * 7", "compute 12+7."]
    assert [seen.earlier(number, text) for number, text in enumerate(texts)] == [None, None, None, 0]
