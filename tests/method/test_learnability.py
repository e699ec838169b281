"""Definitions of learnability, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from persyn.method import learnability
from persyn.method.learnability import LEARNABILITIES

#: log-probability, rank, entropy
TOKENS = np.array([[-1.0, 1, 0.5], [-2.0, 7, 1.5], [-4.0, 250, 3.0], [-1.0, 1, 1.0]])
OF_TOKENS = {"log_likelihood": -8.0, "n_tokens": 4.0, "alone": -10.0, "local": -9.0, **learnability.summarise(TOKENS)}


def test_the_statistics_of_a_part_are_sums_over_its_tokens() -> None:
    assert learnability.summarise(TOKENS) == {
        "squares": 1 + 4 + 16 + 1,
        "lowest": -4.0,  # a fifth of four tokens, rounded up, is one
        "n_lowest": 1.0,
        "lowest_window": -2.0,  # one window
        "rank": 1 + 7 + 100 + 1,  # 250 counts as 100
        "n_first": 2.0,
        "entropy": 6.0,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("log_likelihood", -2.0),
        ("lowest_window", -2.0),
        ("lowest_share", -4.0),
        ("local_log_likelihood", -9 / 4),
        ("rank_surprisal_ratio", -109 / 8),
        ("ifd", 8 / 10),
        ("entropy_aware", (-8 + 6) / 4),
    ],
)
def test_each_definition_is_its_formula(name: str, expected: float) -> None:
    assert learnability.value(LEARNABILITIES[name], OF_TOKENS) == pytest.approx(expected, rel=1e-12)


def test_every_definition_has_a_test_of_its_formula() -> None:
    (parameters,) = [each for each in test_each_definition_is_its_formula.pytestmark if each.name == "parametrize"]
    assert [name for name, _ in parameters.args[1]] == list(LEARNABILITIES)


def test_the_lowest_window_is_the_hardest_passage() -> None:
    """100 tokens make three windows of 33, 33 and 34; the second one is hard."""
    log_likelihoods = np.full(100, -1.0)
    log_likelihoods[33:66] = -3.0
    tokens = np.stack([log_likelihoods, np.ones(100), np.ones(100)], axis=1)

    found = learnability.summarise(tokens)

    assert found["lowest_window"] == pytest.approx(-3.0)
    assert (found["lowest"], found["n_lowest"]) == (pytest.approx(-3.0 * 20), 20)


def test_a_prompt_that_hinders_the_student_counts_as_the_lowest_ifd() -> None:
    """The source discards responses with a ratio above 1."""
    assert learnability.value(LEARNABILITIES["ifd"], OF_TOKENS | {"alone": -8.0}) == 1.0
    assert learnability.value(LEARNABILITIES["ifd"], OF_TOKENS | {"alone": -7.9}) == 0.0


def test_a_whole_response_has_the_sums_of_its_parts_and_the_lower_window() -> None:
    answer, reasoning = learnability.summarise(TOKENS), learnability.summarise(TOKENS - [1.0, 0, 0])

    whole = learnability.joined(answer, reasoning)

    assert whole["rank"] == 218
    assert whole["squares"] == 22 + (4 + 9 + 25 + 4)
    assert whole["lowest_window"] == -3.0
    # A part without tokens has no window.
    empty = learnability.summarise(np.empty((0, 3)))
    assert set(empty.values()) == {0.0}
    assert learnability.joined(empty, reasoning)["lowest_window"] == -3.0
    # Only one of the parts was read without the prompt.
    assert "alone" not in learnability.joined(OF_TOKENS, reasoning)


def test_what_is_undefined_or_unknown_is_nan() -> None:
    for name in LEARNABILITIES:
        assert math.isnan(learnability.value(LEARNABILITIES[name], dict.fromkeys(OF_TOKENS, 0.0)))
    assert math.isnan(learnability.value(LEARNABILITIES["ifd"], {"log_likelihood": -1.0, "n_tokens": 1.0}))
    # A response that the student was certain of has no surprisal to divide by.
    assert math.isnan(learnability.value(LEARNABILITIES["rank_surprisal_ratio"], OF_TOKENS | {"log_likelihood": 0.0}))
