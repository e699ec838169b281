"""Expected rewards trust scores as far as they predicted rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest

from persyn.method import expectation


def test_without_scores_a_teacher_is_expected_to_be_as_good_as_its_mean() -> None:
    rewards = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [np.nan, 0.9]])

    expected = expectation.of_teachers(rewards)

    # The last prompt has one reward, and says nothing about the difference.
    assert expected.levels == pytest.approx([2 / 3, 0.5])
    assert expected.rewards(np.array([[3.0, 0.0]])) == pytest.approx(np.array([[2 / 3, 0.5]]))


def test_missing_responses_to_hard_prompts_do_not_favour_a_teacher() -> None:
    # b is 0.2 better than a and c 0.1 worse on every prompt; a did not answer the hard ones, and has the highest mean.
    rewards = np.array([[0.8, 1.0, 0.7], [0.6, 0.8, 0.5], [np.nan, 0.3, 0.0], [np.nan, 0.4, 0.1]])

    levels = expectation.of_teachers(rewards).levels

    assert (levels - levels[0]).tolist() == pytest.approx([0.0, 0.2, -0.1])


@pytest.mark.parametrize("confidence", [1.0, 5.0])
def test_an_overconfident_router_is_scaled_back(confidence: float) -> None:
    lots = np.random.default_rng(0)
    truth = lots.normal(size=(2_000, 3))
    rewards = 0.1 * truth + np.array([0.2, 0.5, 0.3]) + lots.normal(scale=0.1, size=truth.shape)
    scores = confidence * (truth + np.array([3.0, 0.0, 1.0]))

    expected = expectation.of_scores(scores, rewards)

    assert expected.slope == pytest.approx(0.1 / confidence, rel=0.1)
    # The scores favour the wrong teacher; the measured means correct that.
    assert expected.rewards(scores).mean(axis=0) == pytest.approx(rewards.mean(axis=0), abs=1e-9)


def test_scores_that_predict_nothing_do_not_count() -> None:
    lots = np.random.default_rng(1)
    rewards, scores = lots.random((200, 3)), 10 * lots.normal(size=(200, 3))

    expected = expectation.of_scores(scores, rewards)

    assert expected.slope < 0.002
    assert expectation.of_scores(-rewards, rewards).slope == 0.0
    assert expectation.of_scores(np.full_like(scores, np.nan), rewards).fitted is None


def test_the_slope_is_shrunk_by_its_uncertainty() -> None:
    # Within prompts and teachers the scores are +-1: on 4 prompts rewards go along, on 1 against.
    scores = np.array([[1.0, -1.0], [-1.0, 1.0]] * 5)
    rewards = np.where(scores > 0, 1.0, 0.0)
    rewards[:2] = 1.0 - rewards[:2]

    expected = expectation.of_scores(scores, rewards)

    # Each prompt's slope is 0.5 or -0.5, on average 0.3, with standard error 0.4 / sqrt(10).
    assert expected.fitted == pytest.approx(0.3)
    assert expected.error == pytest.approx(0.4 / np.sqrt(10))
    assert expected.slope == pytest.approx(0.3 * (1 - 0.016 / 0.09))


def test_a_teacher_without_any_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="no reward on any calibration prompt"):
        expectation.of_teachers(np.array([[1.0, 0.0, np.nan], [0.0, 1.0, np.nan]]))


@pytest.mark.parametrize(
    ("fitted", "error", "found"), [(0.2, 0.05, 4.0), (-0.2, 0.05, 0.0), (0.2, 0.0, math.inf), (None, None, 0.0)]
)
def test_evidence_is_the_slope_in_its_standard_errors(fitted: float | None, error: float | None, found: float) -> None:
    assert expectation.Expectation(np.zeros(2), fitted=fitted, error=error).evidence == pytest.approx(found)
