"""Rewards and preferences from raw scores: examples computed by hand, and general properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose, assert_array_equal

from persyn.method import rewards
from persyn.method.rewards import Matrix, Normalisation

NAN = np.nan
HOWS: list[Normalisation] = ["minmax", "zscore", "rank"]

# Integers, so that shifting and scaling is exact.
matrices = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.one_of(st.just(NAN), st.integers(-1000, 1000).map(float)),
)


def matrix(*rows: list[float]) -> Matrix:
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("minmax", [0.0, 0.25, 1.0, 0.25]),
        # mean 1.5, squared deviations 2.25, 0.25, 6.25, 0.25: standard deviation 1.5
        ("zscore", [-1.0, -1 / 3, 5 / 3, -1 / 3]),
        # ranks 0, 1.5, 3, 1.5, divided by 3
        ("rank", [0.0, 0.5, 1.0, 0.5]),
    ],
)
def test_normalised_as_worked_by_hand(how: Normalisation, expected: list[float]) -> None:
    assert_allclose(rewards.normalise(matrix([0, 1, 4, 1]), how), [expected])


@pytest.mark.parametrize("how", HOWS)
def test_a_missing_cell_stays_missing_and_changes_nothing_for_the_others(how: Normalisation) -> None:
    dense = rewards.normalise(matrix([0, 1, 4, 1]), how)[0]

    ragged = rewards.normalise(matrix([0, NAN, 1, 4, NAN, 1]), how)[0]

    assert_allclose(ragged, [dense[0], NAN, dense[1], dense[2], NAN, dense[3]])


@pytest.mark.parametrize("how", HOWS)
def test_equal_scores_and_a_single_score_become_zeros(how: Normalisation) -> None:
    # The mean of three 0.1 is not 0.1 in floating point.
    scores = matrix([0.1, 0.1, 0.1], [NAN, 7, NAN], [NAN, NAN, NAN])

    assert_array_equal(rewards.normalise(scores, how), matrix([0, 0, 0], [NAN, 0, NAN], [NAN, NAN, NAN]))


@given(scores=matrices, how=st.sampled_from(["minmax", "zscore", "rank"]), shift=st.integers(-50, 50))
def test_the_unit_of_a_score_does_not_matter(scores: Matrix, how: Normalisation, shift: int) -> None:
    before = rewards.normalise(scores, how)

    assert_allclose(rewards.normalise(4 * scores + shift, how), before, atol=1e-9)


@given(scores=matrices, how=st.sampled_from(["minmax", "zscore", "rank"]))
def test_normalising_keeps_the_order_within_a_prompt(scores: Matrix, how: Normalisation) -> None:
    before = rewards.preferences(scores)

    after = rewards.preferences(rewards.normalise(scores, how))

    for expected, found in zip(before, after, strict=True):
        assert_array_equal(found, expected)


@given(scores=matrices)
def test_a_rank_depends_on_the_order_alone(scores: Matrix) -> None:
    assert_array_equal(rewards.normalise(scores**3, "rank"), rewards.normalise(scores, "rank"))


@given(scores=matrices)
def test_minmax_and_rank_span_0_to_1(scores: Matrix) -> None:
    for how in ("minmax", "rank"):
        present = rewards.normalise(scores, how)
        present = present[~np.isnan(present)]
        assert ((present >= 0) & (present <= 1)).all()


def test_combined_as_worked_by_hand() -> None:
    quality = matrix([1, 0, 0.5])
    learnability = matrix([-3, -1, -2])

    # minmax: quality 1, 0, 0.5 and learnability 0, 1, 0.5
    assert_allclose(rewards.combine(quality, learnability, alpha=0.4, how="minmax"), [[0.6, 0.4, 0.5]])
    assert_allclose(rewards.combine(quality, learnability, alpha=0.0, how="minmax"), [[1.0, 0.0, 0.5]])
    assert_allclose(rewards.combine(quality, learnability, alpha=1.0, how="minmax"), [[0.0, 1.0, 0.5]])


def test_a_response_counts_only_where_both_scores_are_present() -> None:
    # The quality of 9 would determine the scale if its response had a learnability.
    quality = matrix([0, 9, 1, 0.5])
    learnability = matrix([-1, NAN, -3, -2])

    assert_allclose(rewards.combine(quality, learnability, alpha=0.4, how="minmax"), [[0.4, NAN, 0.6, 0.5]])


def test_the_only_scored_response_to_a_prompt_has_no_reward() -> None:
    quality = matrix([1, NAN], [1, 0], [NAN, 1])
    learnability = matrix([-1, -1], [-2, -1], [-1, NAN])

    combined = rewards.combine(quality, learnability, alpha=0.4, how="minmax")

    assert_allclose(combined, [[NAN, NAN], [0.6, 0.4], [NAN, NAN]])


def test_what_cannot_be_combined_is_named() -> None:
    with pytest.raises(ValueError, match=r"quality \(1, 2\), learnability \(1, 3\)"):
        rewards.combine(matrix([0, 1]), matrix([0, 1, 2]), alpha=0.4, how="minmax")
    with pytest.raises(ValueError, match=r"within \[0, 1\], got 1.5"):
        rewards.combine(matrix([0, 1]), matrix([0, 1]), alpha=1.5, how="minmax")
    with pytest.raises(ValueError, match="minmax, zscore, rank, got 'softmax'"):
        rewards.normalise(matrix([0, 1]), "softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        rewards.normalise(matrix([0, -np.inf]), "minmax")


def test_preferences_are_all_pairs_of_distinct_present_rewards() -> None:
    prompt, winner, loser = rewards.preferences(matrix([3, 1, 3], [NAN, NAN, NAN], [NAN, 1, 2]))

    found = list(zip(prompt.tolist(), winner.tolist(), loser.tolist(), strict=True))

    assert found == [(0, 0, 1), (0, 2, 1), (2, 2, 1)]


@given(scores=matrices)
def test_the_opposite_rewards_give_the_opposite_preferences(scores: Matrix) -> None:
    prompt, winner, loser = rewards.preferences(scores)
    opposite = rewards.preferences(-scores)

    assert set(zip(prompt, winner, loser, strict=True)) == set(zip(opposite[0], opposite[2], opposite[1], strict=True))
    assert not np.isnan(scores[prompt, winner]).any()
    assert (scores[prompt, winner] > scores[prompt, loser]).all()


@given(scores=matrices)
def test_every_pair_is_a_preference_once_unless_it_is_tied_or_incomplete(scores: Matrix) -> None:
    expected = sum(
        bool(row[a] != row[b])
        for row in scores
        for a, b in zip(*np.triu_indices(len(row), 1), strict=True)
        if not np.isnan(row[[a, b]]).any()
    )

    assert len(rewards.preferences(scores)[0]) == expected


def test_means_of_parts_are_those_of_the_whole() -> None:
    means = rewards.RunningMeans()
    means.add(matrix([1, NAN, NAN], [3, 5, NAN]))
    means.add(matrix([5, NAN, NAN]))

    assert_array_equal(means.found, [3.0, 5.0, NAN])
    assert np.isnan(rewards.RunningMeans().found)


def test_the_static_ranking_is_the_mean_reward_of_the_present_cells() -> None:
    assert_array_equal(rewards.static_ranking(matrix([1, 0, NAN], [0, 3, NAN])), [0.5, 1.5, NAN])
    # A teacher with rewards only on prompts without comparison is ranked by those.
    assert_array_equal(rewards.static_ranking(matrix([1, 0, NAN], [NAN, NAN, 0.5])), [1.0, 0.0, 0.5])


def test_an_answer_that_nobody_else_gave_does_not_count_against_a_teacher() -> None:
    common = [(1, 0), (1, 0), (0, 1)]
    alone = [(5, NAN)] * 4  # normalised to 0, like equal scores
    alike = [(5, 5)] * 2
    normalised = rewards.normalise(matrix(*common, *alone, *alike), "minmax")
    # Over all prompts it would be at most 2/9 and 1/5; over comparable prompts it is 2/3 and 1/3.
    assert rewards.static_ranking(normalised) == pytest.approx([2 / 3, 1 / 3])
