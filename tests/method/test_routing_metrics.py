"""Router metrics computed by hand, and exact expectations for random choice."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persyn.method import routing_metrics
from persyn.method.rewards import Matrix

NAN = np.nan


def matrix(*rows: list[float]) -> Matrix:
    return np.array(rows, dtype=np.float64)


REWARDS = matrix([0.9, 0.1, 0.2, 0.5], [0.0, 1.0, 1.0, 0.5], [NAN, 0.2, 0.8, NAN], [0.3, 0.3, NAN, 0.3], [NAN] * 4)
SCORES = matrix([1, 4, 3, 2], [2, 3, 1, 0], [9, 1, 2, 8], [4, 3, 2, 1], [1, 2, 3, 4])


def test_metrics_as_worked_by_hand() -> None:
    found = routing_metrics.evaluate(SCORES, REWARDS)

    # Prompt 4 has no reward, prompt 3 is tied. Prompt 0 is routed to teacher 1, but the best is the fourth of four;
    # prompt 1 to teacher 1, one of two best; prompt 2 to teacher 2, one of two present.
    assert found["n_prompts"] == 4
    assert found["n_tied"] == 1
    assert found["hit1"] == pytest.approx(2 / 3)
    assert found["hit3"] == pytest.approx(2 / 3)
    assert found["routed_reward"] == pytest.approx((0.1 + 1.0 + 0.8 + 0.3) / 4)
    assert found["regret"] == pytest.approx((0.8 + 0.0 + 0.0 + 0.0) / 4)
    # None of prompt 0's six pairs is ordered correctly; of prompt 1's five pairs, those that teacher 1 wins and 2 over
    # 3; prompt 2 has one pair, which is correct.
    assert found["pair_accuracy"] == pytest.approx(4 / 12)


def test_a_hit_at_three_needs_the_best_among_the_first_three() -> None:
    rewards = matrix([0, 0, 1, 0, 0])

    assert routing_metrics.evaluate(matrix([5, 4, 3, 2, 1]), rewards)["hit3"] == 1.0
    assert routing_metrics.evaluate(matrix([5, 4, 1, 3, 2]), rewards)["hit3"] == 0.0


def test_of_three_teachers_a_hit_at_three_says_nothing() -> None:
    rewards = matrix([0, 0, 1])

    assert routing_metrics.evaluate(matrix([3, 2, 1]), rewards)["hit3"] is None
    assert routing_metrics.evaluate_random(rewards)["hit3"] is None


def test_a_missing_teacher_is_never_chosen_however_high_its_score() -> None:
    found = routing_metrics.evaluate(matrix([np.inf, -np.inf, 0]), matrix([NAN, 1, 0]))

    assert found["routed_reward"] == 0.0
    assert found["hit1"] == 0.0


def test_equal_scores_choose_the_earlier_teacher_and_are_half_right_as_a_pair() -> None:
    found = routing_metrics.evaluate(matrix([1, 1]), matrix([0, 1]))

    assert found["routed_reward"] == 0.0
    assert found["pair_accuracy"] == 0.5


def test_win_probabilities_are_held_against_what_came_true() -> None:
    log_odds = math.log(4)  # 0.8
    scores = matrix(*[[log_odds, 0]] * 10)
    # Eight of ten correct: exactly as predicted. Five of ten: overconfident by 0.3.
    assert routing_metrics.calibration_error(
        scores, matrix(*[[1, 0]] * 8, *[[0, 1]] * 2), preferences="equal"
    ) == pytest.approx(0.0)
    assert routing_metrics.calibration_error(
        scores, matrix(*[[1, 0]] * 5, *[[0, 1]] * 5), preferences="equal"
    ) == pytest.approx(0.3)


def test_each_bin_of_win_probabilities_weighs_as_much_as_it_holds() -> None:
    sure = math.log(19)  # 0.95
    scores = matrix([sure, 0], [sure, 0], [sure, 0], [0, 0])
    # Three predictions of 0.95, two of them correct: off by 2.85 - 2. One of 0.5, half correct.
    found = routing_metrics.calibration_error(scores, matrix([1, 0], [1, 0], [0, 1], [1, 0]), preferences="equal")
    assert found == pytest.approx(abs(3 * 0.95 - 2) / 4)


def test_of_no_prompt_nothing_is_claimed() -> None:
    nothing = matrix([NAN, NAN])

    for found in (routing_metrics.evaluate(matrix([1, 2]), nothing), routing_metrics.evaluate_random(nothing)):
        assert {found[name] for name in ("hit1", "hit3", "pair_accuracy", "routed_reward", "regret")} == {None}
        assert found["n_prompts"] == 0
    assert routing_metrics.calibration_error(matrix([1, 2]), nothing, preferences="weighted") is None


def test_calibration_counts_by_weight_where_preferences_are_weighted() -> None:
    """Ties count as half correct. Of two predictions of 0.73, the correct one has weight 3, the wrong one weight 1."""
    scores = matrix([0, 0], [1, 0], [0, 1])
    found = routing_metrics.calibration_error(scores, matrix([9, 0], [3, 0], [1, 0]), preferences="weighted")
    # In the bin of 0.731: |4 x 0.731 - 3|; in that of 0.5: 0; divided by the total weight of 13.
    assert found == pytest.approx(abs(4 / (1 + math.exp(-1)) - 3) / 13)


def test_the_static_choice_knows_the_calibration_alone() -> None:
    calibration = matrix([0, 1, NAN], [0.5, 1, NAN])
    holdout = matrix([1, 0, 0.5], [0, NAN, 1])

    static = routing_metrics.compare(np.zeros((2, 3)), holdout, calibration, preferences="weighted")["static"]

    # Teacher 1 was best, then 0; teacher 2 was never observed and comes last.
    assert static["routed_reward"] == pytest.approx((0 + 0) / 2)
    assert static["hit1"] == 0.0


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores \(1, 2\), rewards \(1, 3\)"):
        routing_metrics.evaluate(matrix([1, 2]), matrix([1, 2, 3]))


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.sampled_from([NAN, 0.0, 0.5, 1.0]))
)
def test_the_random_choice_is_the_mean_over_every_order(rewards: Matrix) -> None:
    orders = [np.tile(np.array(p, dtype=np.float64), (len(rewards), 1)) for p in permutations(range(rewards.shape[1]))]
    every = [routing_metrics.evaluate(order, rewards) for order in orders]

    random = routing_metrics.evaluate_random(rewards)

    for name, value in random.items():
        if value is None:
            assert every[0][name] is None
        else:
            assert math.isclose(value, float(np.mean([found[name] for found in every])), abs_tol=1e-9)


def test_hits_are_hit_rates_of_every_k_beside_what_reads_no_prompt() -> None:
    calibration = matrix([0.1, 0.9, 0.5, 0.2])

    found = routing_metrics.hits(SCORES, REWARDS, calibration)

    # Prompts 0, 1 and 2 count, 3 is tied. Static picks teachers 1, 2, 3, 0 in this order, among those present.
    assert found is not None
    assert found.n_prompts == 3
    assert found.router == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1])
    assert found.static == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    # By chance: 1/4, 2/4, 1/2; then 2/4, 1 - C(2,2)/C(4,2), 2/2.
    assert found.random[:2] == pytest.approx([(1 / 4 + 1 / 2 + 1 / 2) / 3, (1 / 2 + 5 / 6 + 1) / 3])
    assert routing_metrics.hits(SCORES[3:4], REWARDS[3:4], calibration) is None


def test_reliability_says_how_often_a_prediction_came_true() -> None:
    scores = matrix([math.log(3), 0], [0, math.log(3)], [math.log(9), 0])
    rewards = matrix([1.0, 0.0], [0.5, 0.0], [0.2, 0.0])

    weighted = routing_metrics.reliability(scores, rewards, preferences="weighted")
    equal = routing_metrics.reliability(scores, rewards, preferences="equal")

    # Two with odds of 3 to 1, the first of which is correct, with twice the weight; one with odds of 9 to 1.
    assert [(b.n_preferences, b.predicted, b.observed_frequency, b.weight) for b in weighted] == [
        (2, pytest.approx(0.75), pytest.approx(2 / 3), pytest.approx(1.5)),
        (1, pytest.approx(0.9), pytest.approx(1.0), pytest.approx(0.2)),
    ]
    assert [bin_.observed_frequency for bin_ in equal] == [0.5, 1.0]
