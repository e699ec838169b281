"""Means, standard errors and preferences of cells with several samples: worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from persyn.method import rewards, routing_metrics
from persyn.method.rewards import Matrix, Normalisation

NAN = np.nan


def matrix(*rows: list[float]) -> Matrix:
    return np.array(rows, dtype=np.float64)


def test_a_cell_is_the_mean_of_the_samples_that_have_a_score() -> None:
    cells = np.array([[[1.0, 0.0, NAN, 1.0], [NAN, NAN, NAN, NAN]]])
    assert_allclose(rewards.sample_means(cells), [[2 / 3, NAN]])


def test_the_same_samples_in_another_order_have_exactly_the_same_mean() -> None:
    cells = np.array([[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]]])
    assert len(set(rewards.sample_means(cells)[0])) == 1


def test_a_standard_error_is_moderated_by_the_other_cells() -> None:
    cells = np.array([[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, NAN, NAN, NAN], [NAN] * 4]])
    # squared deviations 1, 0, 0 with 3, 3 and 0 degrees of freedom: pooled variance 1/6, which counts as one sample
    variances = [(1 + 1 / 6) / 4, (0 + 1 / 6) / 4, 1 / 6]
    expected = [math.sqrt(variances[0] / 4), math.sqrt(variances[1] / 4), math.sqrt(variances[2]), 0.0]
    assert_allclose(rewards.sample_errors(cells), [expected])


def test_four_times_as_many_samples_halve_the_error() -> None:
    draw = np.random.default_rng(0)
    errors = [rewards.sample_errors((draw.random((400, 3, n)) < 0.5).astype(float)).mean() for n in (8, 32)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_of_single_samples_no_error_is_known() -> None:
    assert not rewards.sample_errors(np.array([[[1.0], [0.0]], [[NAN], [1.0]]])).any()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # quality over a range of 0.8, learnability over one of 2
        ("minmax", [math.hypot(0.6 * 0.08 / 0.8, 0.4 * 0.1 / 2), math.hypot(0.6 * 0.16 / 0.8, 0.4 * 0.2 / 2)]),
        # two scores are half their difference away from their mean
        ("zscore", [math.hypot(0.6 * 0.08 / 0.4, 0.4 * 0.1 / 1), math.hypot(0.6 * 0.16 / 0.4, 0.4 * 0.2 / 1)]),
    ],
)
def test_the_error_of_a_reward_is_on_the_scale_of_its_row(how: Normalisation, expected: list[float]) -> None:
    raw = matrix([0.1, 0.9]), matrix([-1, -3]), matrix([0.08, 0.16]), matrix([0.1, 0.2])
    assert_allclose(rewards.combine_errors(*raw, alpha=0.4, how=how), [expected])


def test_a_rank_is_unsure_where_its_comparisons_are() -> None:
    quality, errors = matrix([0, 0.3, 9], [5, 5, 5]), matrix([0.3, 0.4, 0], [1, 1, 1])
    found = rewards.combine_errors(quality, quality, errors, 0 * errors, alpha=0, how="rank")

    chance = 0.5 * (1 + math.erf(0.6 / math.sqrt(2)))  # 0.3 apart with an error of 0.5
    unsure = math.sqrt(chance * (1 - chance)) / 2
    assert_allclose(found, [[unsure, unsure, 0], [0, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("how", ["weighted", "equal"])
def test_exact_rewards_give_each_preference_one_direction(how: str) -> None:
    cells = matrix([0.9, 0.2, NAN, 0.2])
    gap = 0.7 if how == "weighted" else 1.0
    expected = np.zeros((1, 4, 4))
    expected[0, 0, 1] = expected[0, 0, 3] = gap

    assert_allclose(rewards.preference_weights(cells, how), expected)
    assert_array_equal(rewards.preference_weights(cells, how, np.zeros((1, 4))), rewards.preference_weights(cells, how))


def test_an_unsure_preference_has_both_directions_and_keeps_their_difference() -> None:
    # 0.3 apart with errors of 0.3 and 0.4: the difference is 0.6 standard errors of 0.5
    chance = 0.5 * (1 + math.erf(0.6 / math.sqrt(2)))
    density = math.exp(-0.18) / math.sqrt(2 * math.pi)
    cells, errors = matrix([0.8, 0.5]), matrix([0.3, 0.4])

    (equal,) = rewards.preference_weights(cells, "equal", errors)
    assert_allclose(equal, [[0, chance], [1 - chance, 0]])
    (weighted,) = rewards.preference_weights(cells, "weighted", errors)
    assert weighted[0, 1] == pytest.approx(0.3 * chance + 0.5 * density)
    assert weighted[0, 1] - weighted[1, 0] == pytest.approx(0.3)


def test_the_surer_a_preference_the_nearer_it_is_to_an_exact_one() -> None:
    losers = [
        rewards.preference_weights(matrix([0.8, 0.5]), "equal", matrix([error, 0]))[0, 1, 0]
        for error in (1.0, 0.3, 0.1, 0.0)
    ]
    assert losers == sorted(losers, reverse=True)
    assert losers[-1] == 0


def test_a_router_as_unsure_as_the_preferences_is_calibrated() -> None:
    cells, errors = matrix([0.8, 0.5]), matrix([0.3, 0.4])
    chance = 0.5 * (1 + math.erf(0.6 / math.sqrt(2)))
    scores = matrix([math.log(chance / (1 - chance)), 0])

    assert routing_metrics.calibration_error(scores, cells, preferences="equal", errors=errors) == pytest.approx(0)
    assert routing_metrics.calibration_error(scores, cells, preferences="equal") == pytest.approx(1 - chance)
