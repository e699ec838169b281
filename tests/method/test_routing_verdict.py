"""The verdict on routing: arithmetic by hand, and how often it is right in worlds whose truth is known."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from persyn.method.rewards import Indices, Matrix
from persyn.method.verdict import Evidence, Outcome, Verdict, always, difference, is_group, judge

#: Two teachers on four prompts, and router scores that choose the first, the first, the first and the second.
REWARDS = np.array([[1, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float64)
SCORES = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float64)
Z97, Z80 = 1.959964, 0.841621


def evidence(rewards: Matrix, scores: Matrix, n_prompts: int = 100, groups: Sequence[str] | None = None) -> Evidence:
    names = [chr(ord("a") + column) for column in range(rewards.shape[1])]
    return Evidence(names, rewards, scores, n_prompts, groups, {0.0: rewards, 1.0: 1 - rewards})


def test_the_gain_and_its_interval_are_those_over_every_teacher() -> None:
    found = judge(evidence(REWARDS, SCORES))

    # The router has 1 on every prompt. Over a it gains 0, 0, 0, 1; over b 1, 1, 0, 0. Two imaginary prompts with
    # differences of 1 and -1 add 2 to the squares: 3 / 4 and 1.
    error_a, error_b = math.sqrt(0.75 + 2) / 4, math.sqrt(1 + 2) / 4
    assert found.teacher == "a"
    assert (found.router, found.single, found.oracle) == pytest.approx((1.0, 0.75, 1.0))
    assert found.gain.mean == pytest.approx(0.25)
    assert found.gain.low == pytest.approx(min(0.25 - Z97 * error_a, 0.5 - Z97 * error_b))
    assert found.gain.high == pytest.approx(min(0.25 + 1.5 * Z97 * error_a, 0.5 + 1.5 * Z97 * error_b))
    assert found.total.mean == pytest.approx(25.0)
    assert found.gap_closed is not None
    assert found.gap_closed.mean == pytest.approx(1.0)
    assert found.outcome == "cannot tell"


def test_what_is_missing_to_a_verdict_follows_from_the_width_of_the_interval() -> None:
    rewards, scores = np.tile(REWARDS, (300, 1)), np.tile(SCORES, (300, 1))
    # On 600 further prompts every teacher is right, so that the gain over a is 300 / 1800.
    rewards, scores = np.vstack([rewards, np.ones((600, 2))]), np.vstack([scores, np.zeros((600, 2))])
    few = judge(evidence(rewards[:8], scores[:8]))

    assert judge(evidence(rewards, scores)).outcome == "route"
    assert few.outcome == "cannot tell"
    # As on 4 prompts, 0.25 over a with 8 prompts: squares 2 * 0.75 + 2. (1.96 * 0.2339 / 0.25)^2 * 8 = 26.9 prompts
    # would tell, but a router is not judged for good on fewer than 1,000.
    assert few.more == 1_000


def test_where_the_gain_is_measured_on_the_hold_out_more_counts_all_calibration_prompts() -> None:
    rewards, scores = np.tile(REWARDS, (25, 1)), np.tile(SCORES, (25, 1))
    scores[np.arange(100) % 5 > 0] = np.nan
    found = judge(evidence(rewards, scores))

    # On the 20 measured ones the gain is as before, and any certainty is there before 1,000 calibration prompts are.
    assert (found.n_calibration, found.n_measured, found.gain.mean) == (100, 20, pytest.approx(0.25))
    assert (found.outcome, found.more) == ("cannot tell", 900)


def test_groups_take_a_time_in_proportion_to_the_prompts() -> None:
    n = 6_000
    rewards, scores = np.tile(REWARDS, (n // 4, 1)), np.tile(SCORES, (n // 4, 1))
    tracemalloc.start()
    found = judge(evidence(rewards, scores, groups=[str(row // 3) for row in range(n)]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.groups) == 2_000
    assert most < 20 * 2**20  # a table of prompts and groups has 92 MiB
    assert [is_group(["a"] * 5 + ["b"] * 5), is_group([str(row // 2) for row in range(10)])] == [True, True]
    assert [is_group([str(row) for row in range(10)]), is_group(["a", *"bcdefg"]), is_group([])] == [False, False, True]


def test_more_prompts_are_asked_for_where_a_small_gain_is_not_told_from_none() -> None:
    rng = np.random.default_rng(0)
    rewards = (rng.random((4_000, 2)) < 0.5).astype(np.float64)
    right = rng.random(4_000) < 0.52
    scores = np.where(right[:, None], rewards, 1 - rewards)
    found = judge(evidence(rewards[:2_000], scores[:2_000]))

    assert found.outcome == "cannot tell"
    assert found.more is not None
    assert 100 <= found.more <= 20_000


def test_a_router_that_always_takes_the_best_teacher_is_not_worth_it() -> None:
    rng = np.random.default_rng(1)
    rewards = (rng.random((400, 3)) < np.array([0.7, 0.5, 0.4])).astype(np.float64)
    found = judge(evidence(rewards, np.tile([3.0, 2.0, 1.0], (400, 1))))

    assert (found.outcome, found.teacher, found.gain.mean, found.more) == ("do not route", "a", 0.0, None)
    assert found.gain.low < 0 < found.gain.high  # all differences are 0, which 400 prompts do not prove


def test_a_gain_below_a_hundredth_is_not_worth_it_however_small_the_gap_is() -> None:
    # Always taking a is right on 124 of 125 prompts, so that 5% of the gap is 0.0004. All differences over a are 0: two
    # imaginary prompts alone make the error, sqrt(2) / 125 = 0.0113, and 0.84 of it is 0.0095.
    rewards = np.tile([1.0, 0.0], (125, 1))
    rewards[0] = [0.0, 1.0]
    scores = np.tile([1.0, 0.0], (125, 1))
    found = judge(evidence(rewards, scores))

    assert (found.outcome, found.worthwhile) == ("do not route", pytest.approx(0.01))
    assert judge(evidence(rewards[:100], scores[:100])).outcome == "cannot tell"  # 0.0119 is more than 0.01
    assert judge(evidence(2 * rewards, scores)).worthwhile == pytest.approx(0.02)  # rewards in another unit


def test_a_few_lucky_prompts_are_no_evidence() -> None:
    rewards = np.tile([1.0, 0.0], (100, 1))
    scores = rewards.copy()
    rewards[:4] = [0.0, 1.0]
    scores[:4] = [0.0, 1.0]

    assert judge(evidence(rewards, scores)).gain.mean == pytest.approx(0.04)
    assert judge(evidence(rewards, scores)).outcome != "route"


def test_where_a_response_is_missing_the_next_best_teacher_stands_in() -> None:
    rewards = np.array([[1, 0, 0.5], [np.nan, 0, 1], [1, 1, np.nan]])

    # b and c: 1 / 3 and 3 / 4 by their means; a leads.
    assert always(rewards, np.array([1.0, 1 / 3, 0.75])).tolist() == [[1, 0, 0.5], [1, 0, 1], [1, 1, 1]]


def test_prompts_without_two_rewards_or_without_scores_are_left_out() -> None:
    rewards = np.vstack([REWARDS, [[1, np.nan]], [[1, 0]]])
    scores = np.vstack([SCORES, [[0, 1]], [[np.nan, np.nan]]])

    assert judge(evidence(rewards, scores)).n_measured == 4
    with pytest.raises(ValueError, match="no calibration prompt has two rewards"):
        judge(evidence(rewards[4:], scores[4:]))


def test_groups_say_where_the_gain_comes_from() -> None:
    rewards, scores = np.tile(REWARDS, (50, 1)), np.tile(SCORES, (50, 1))
    found = judge(evidence(rewards, scores, groups=["sums", "sums", "sums", "words"] * 50))
    words, sums = found.groups

    assert (words.group, words.n_prompts, words.teacher, sums.teacher) == ("words", 50, "b", "a")
    assert (words.lead.mean, words.gain.mean, words.part) == pytest.approx((1.0, 1.0, 0.25))
    assert (sums.lead.mean, sums.gain.mean, sums.part) == pytest.approx((0.0, 0.0, 0.0))
    assert not found.one_leads
    assert found.by_group is not None
    assert found.by_group.mean == pytest.approx(0.25)  # b for words: all that there is to gain


def test_one_teacher_leads_in_every_group_where_routing_gains_nothing() -> None:
    found = judge(evidence(REWARDS, SCORES, groups=["x", "y", "x", "x"]))

    assert found.one_leads
    assert judge(evidence(REWARDS, SCORES)).by_group is None


def test_the_lead_is_shown_at_each_alpha_and_a_near_tie_is_one() -> None:
    found = judge(evidence(REWARDS, SCORES))

    # At alpha 1 the rewards are reversed: 0.25 for a, 0.5 for b.
    assert [(at.alpha, at.teacher, at.second) for at in found.alphas] == [(0.0, "a", "b"), (1.0, "b", "a")]
    assert [at.lead.mean for at in found.alphas] == pytest.approx([0.25, 0.25])
    assert found.is_near_tie
    assert not judge(evidence(np.tile([[1.0, 0.0]], (50, 1)), np.zeros((50, 2)))).is_near_tie


def test_a_difference_has_the_standard_error_of_its_pairs_and_two_more() -> None:
    found = difference(np.array([0.5, -0.5, 0.5, 0.5]), spread=0.5)

    error = math.sqrt(3 * 0.25**2 + 0.75**2 + 2 * 0.25) / 4
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25 - Z97 * error, 0.25 + Z97 * error))


#: Chances of three teachers to be right, by group of equally frequent prompts.
WORLDS = {
    "pays": np.array([[0.9, 0.4, 0.3], [0.3, 0.8, 0.3], [0.6, 0.5, 0.6], [0.5, 0.6, 0.9]]),
    "pays a little": np.array([[0.6, 0.5, 0.5], [0.5, 0.58, 0.5], [0.55, 0.5, 0.5], [0.5, 0.5, 0.5]]),
    "does not pay": np.array([[0.9, 0.5, 0.4], [0.6, 0.3, 0.3], [0.7, 0.5, 0.6], [0.5, 0.4, 0.3]]),
    "is a tie": np.full((4, 3), 0.5),
}


def resampled(chances: Matrix, n: int, seed: int) -> tuple[Verdict, float]:
    """The verdict on a router that knows each prompt's group, and its true gain over the best single teacher."""
    rng = np.random.default_rng([seed, n])
    group = rng.integers(len(chances), size=n)
    rewards = (rng.random((n, chances.shape[1])) < chances[group]).astype(np.float64)
    fold, scores = rng.permutation(n) % 5, np.empty(rewards.shape)
    for out in range(5):
        scores[fold == out] = fitted(rewards[fold != out], group[fold != out], len(chances))[group[fold == out]]
    choice = fitted(rewards, group, len(chances)).argmax(axis=1)
    truth = chances[np.arange(len(chances)), choice].mean() - chances.mean(axis=0).max()
    return judge(evidence(rewards, scores)), float(truth)


def fitted(rewards: Matrix, group: Indices, n_groups: int) -> Matrix:
    """(G, K) mean reward by group, shrunk towards that of all."""
    is_in = np.eye(n_groups)[group]
    return np.asarray((is_in.T @ rewards + 10 * rewards.mean(axis=0)) / (is_in.sum(axis=0)[:, None] + 10))


@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize("world", WORLDS)
def test_the_interval_covers_the_truth_and_route_is_hardly_ever_wrong(world: str, n: int) -> None:
    found = [resampled(WORLDS[world], n, seed) for seed in range(100)]

    covered = np.mean([verdict.gain.low <= truth <= verdict.gain.high for verdict, truth in found])
    wrong = np.mean([verdict.outcome == "route" and truth <= 0 for verdict, truth in found])
    assert covered >= 0.92
    assert wrong <= 0.05


@pytest.mark.parametrize(("world", "outcome"), [("pays", "route"), ("does not pay", "do not route")])
def test_a_world_that_is_clear_gets_a_clear_verdict(world: str, outcome: Outcome) -> None:
    found = [resampled(WORLDS[world], 800, seed)[0].outcome for seed in range(20)]

    assert found.count(outcome) >= 16


def test_few_prompts_tell_nothing() -> None:
    assert {resampled(WORLDS["pays"], 49, seed)[0].outcome for seed in range(10)} == {"cannot tell"}
    assert "route" in {resampled(WORLDS["pays"], 100, seed)[0].outcome for seed in range(10)}
