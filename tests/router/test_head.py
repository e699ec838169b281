"""The convex fit of the head finds what the features predict, and predicts nothing if they carry no information."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persyn.method import routing_metrics
from persyn.method.rewards import Matrix, preferences, static_ranking
from persyn.router import head
from persyn.router.head import Head


def scores(fitted: Head, features: NDArray[np.float64]) -> Matrix:
    return np.asarray((torch.from_numpy(features) @ fitted.weight.T + fitted.bias).numpy())


def fit(features: NDArray[np.float64], rewards: Matrix, seed: int = 0, preferences: str = "weighted") -> Head:
    return head.fit(torch.from_numpy(features), rewards, preferences=preferences, seed=seed, tick=lambda: None)


def test_what_depends_on_the_features_is_learned_in_their_own_unit() -> None:
    draw = np.random.default_rng(0)
    # Far from standardised: different centres and scales per dimension, and a constant one.
    features = np.hstack([draw.normal(size=(300, 8)) * 10.0 ** np.arange(-3, 5) + 100, np.full((300, 1), 0.1)])
    truth = draw.normal(size=(3, 8))
    rewards = (features[:, :8] - 100) / 10.0 ** np.arange(-3, 5) @ truth.T

    fitted = fit(features[:200], rewards[:200])

    found = routing_metrics.compare(
        scores(fitted, features[200:]), rewards[200:], rewards[:200], preferences="weighted"
    )
    assert math.isfinite(fitted.penalty)
    assert found["router"]["hit1"] > 0.9 > 0.6 > found["static"]["hit1"]  # type: ignore[operator]


def test_without_features_that_tell_the_strengths_are_bradley_terry() -> None:
    # Teacher 0 beats teacher 1 on 30 of 40 prompts: odds of 3.
    rewards = np.array([[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 10)

    fitted = fit(np.ones((40, 4)), rewards)

    assert fitted.penalty == math.inf
    assert float(fitted.bias[0] - fitted.bias[1]) == pytest.approx(math.log(3), abs=0.01)
    assert not fitted.weight.any()


def test_a_head_that_reads_nothing_is_the_static_ranking() -> None:
    """Of 28 prompts, teacher 2 gains more on 1 than it loses to 0; the mean of 0 is the highest, by 0.1."""
    rewards = np.array([[1.0, 0.0, 0.6]] * 22 + [[0.0, 1.0, 1.0]] * 6)

    fitted = fit(np.ones((28, 4)), rewards)

    assert fitted.penalty == math.inf
    assert fitted.bias.argsort(descending=True).tolist() == [0, 2, 1]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 6), st.floats(0.0, 0.4))
def test_it_is_so_on_every_grid(seed: int, n: int, n_teachers: int, share_missing: float) -> None:
    draw = np.random.default_rng(seed)
    rewards = draw.choice([0.0, 0.2, 0.5, 0.9, 1.0], size=(n, n_teachers))
    rewards[draw.random(rewards.shape) < share_missing] = np.nan
    ranking = static_ranking(rewards)
    assume(len(preferences(rewards)[0]) and not np.isnan(ranking).any())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "PENALTIES", (math.inf,))
        fitted = fit(draw.normal(size=(n, 3)), rewards)

    assert not fitted.weight.any()
    for better, worse in itertools.permutations(range(n_teachers), 2):
        if ranking[better] > ranking[worse] + 1e-9:
            assert fitted.bias[better] > fitted.bias[worse]


@pytest.mark.parametrize(("how", "first"), [("weighted", 1), ("equal", 0)])
def test_many_narrow_wins_do_not_outweigh_a_few_wide_ones(how: str, first: int) -> None:
    """Teacher 0 wins 30 of 40 prompts by 0.1, teacher 1 wins 10 by 1 and has the higher mean reward, by 0.175."""
    rewards = np.array([[0.6, 0.5]] * 30 + [[0.0, 1.0]] * 10)

    fitted = fit(np.ones((40, 4)), rewards, preferences=how)

    assert int(fitted.bias.argmax()) == first


def test_a_teacher_that_always_wins_has_a_finite_strength() -> None:
    fitted = fit(np.ones((20, 2)), np.array([[1.0, 0.0, 0.5]] * 20))

    assert torch.isfinite(fitted.bias).all()
    assert fitted.bias.argsort().tolist() == [1, 2, 0]


def test_pure_noise_is_not_taken_for_knowledge() -> None:
    static, gains = [], []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        features = draw.normal(size=(400, 16))
        # One teacher is slightly better on average, whatever the prompt.
        rewards = draw.normal(size=(400, 5)) + np.array([0.3, 0, 0, 0, 0])
        fitted = fit(features[:100], rewards[:100], seed)
        found = routing_metrics.compare(
            scores(fitted, features[100:]), rewards[100:], rewards[:100], preferences="weighted"
        )
        static.append(fitted.penalty == math.inf)
        gains.append(found["router"]["routed_reward"] - found["static"]["routed_reward"])  # type: ignore[operator]

    assert sum(static) >= 4
    # The mean of 300 rewards with deviation 1 has a standard error of 0.06, and the mean of five such of 0.03.
    assert np.mean(gains) > -0.06


def test_a_fit_is_decided_by_its_seed() -> None:
    draw = np.random.default_rng(0)
    features, rewards = draw.normal(size=(30, 4)), draw.normal(size=(30, 3))

    assert torch.equal(fit(features, rewards).weight, fit(features, rewards).weight)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_prompts_than_folds_can_be_fitted(n: int) -> None:
    fitted = fit(np.random.default_rng(0).normal(size=(n, 4)), np.array([[0.0, 1.0]] * n))

    assert float(fitted.bias[1]) > float(fitted.bias[0])
