"""Heads refitted to fewer prompts and other rewards, on informative features."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from persyn.analysis.refits import CurvePoint, _verdict, curve_sizes
from persyn.method.rewards import Matrix
from persyn.router import refit
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS


@pytest.fixture(scope="module")
def world() -> tuple[Matrix, Matrix]:
    """200 prompts of two kinds that the features separate; each kind has its best teacher, a third is good at both."""
    chance = np.random.default_rng(0)
    kind = np.arange(200) % 2
    features = np.column_stack([2.0 * kind - 1.0, chance.normal(size=200)]) + 0.1 * chance.normal(size=(200, 2))
    rewards = np.where(kind[:, None] == [0, 1, 2], 1.0, [0.0, 0.0, 0.6]) + 0.01 * chance.random((200, 3))
    return features, rewards


def holdout() -> NDArray[np.bool_]:
    return np.arange(200) >= 150


def test_a_head_learns_who_is_good_at_what(world: tuple[Matrix, Matrix]) -> None:
    features, rewards = world
    scores = refit.scores(ROUTERS["head"], Prompts({"backbone": features}), Examples(rewards), np.arange(150))
    assert scores.shape == (200, 3)
    assert scores[150:].argmax(axis=1).tolist() == [0, 1] * 25


def test_without_a_preference_nobody_is_preferred(world: tuple[Matrix, Matrix]) -> None:
    features, rewards = world
    prompts, tied = Prompts({"backbone": features}), Examples(np.ones_like(rewards))
    assert not refit.scores(ROUTERS["head"], prompts, tied, np.arange(150)).any()
    found = refit.all_scores(prompts, tied, np.arange(150))
    assert {"head", "neighbours"} <= found.keys()
    assert not any(scores.any() for scores in found.values())


def test_a_curve_rises_from_the_static_choice_to_the_oracle(world: tuple[Matrix, Matrix]) -> None:
    features, rewards = world
    fit_to = partial(refit.scores, ROUTERS["head"], Prompts({"backbone": features}), Examples(rewards))
    points = refit.curve(fit_to, rewards, holdout(), [10, 50, 150], preferences="weighted", seed=0)

    assert [point.n_calibration for point in points] == [10, 50, 150]
    # The third teacher is the best single one, slightly above 0.6.
    assert points[-1].static == pytest.approx(0.605, abs=0.005)
    assert points[-1].reward == pytest.approx(rewards[150:].max(axis=1).mean())
    assert points[0].reward <= points[-1].reward
    assert points[-1].deviation == 0


def test_sizes_double_up_to_all_there_are() -> None:
    assert curve_sizes(130) == [25, 50, 65, 100, 130]
    assert curve_sizes(40) == [25, 40]
    assert curve_sizes(25) == [25]
    assert curve_sizes(7) == [7]


@pytest.mark.parametrize(
    ("sizes", "closed", "deviation", "said"),
    [
        ((50, 100, 200), (0.10, 0.40, 0.41), 0.0, "would not help: 200 prompts close +1% (+-0%) more"),
        ((50, 100, 200), (0.10, 0.20, 0.50), 0.0, "may help: 200 prompts close +30% (+-0%) more"),
        # The mean of five draws with a deviation of 0.03 has a standard error of 0.0134, 4% of a gap of 0.3.
        ((50, 100, 200), (0.10, 0.20, 0.27), 0.03, "would not help: 200 prompts close +7% (+-4%) more"),
        ((50, 100, 200), (0.10, 0.20, 0.30), 0.03, "may help: 200 prompts close +10% (+-4%) more"),
    ],
)
def test_the_verdict_compares_all_prompts_with_half_of_them(
    sizes: tuple[int, ...], closed: tuple[float, ...], deviation: float, said: str
) -> None:
    pairs = zip(sizes, closed, strict=True)
    points = [CurvePoint(size, 0.5 + 0.3 * part, deviation, 0.5, part) for size, part in pairs]
    assert _verdict(points, 0.3, has_head=False) == f"more calibration {said} of the way to the oracle than 100 did"
    assert _verdict(points, 0.3, has_head=True).endswith(
        "did; measured with heads: a fine-tuned backbone may gain more from more prompts"
    )


@pytest.mark.parametrize("sizes", [(40,), (25, 40)])
def test_without_half_of_them_there_is_no_verdict(sizes: tuple[int, ...]) -> None:
    points = [CurvePoint(size, 0.5, 0.0, 0.5, 0.0) for size in sizes]
    assert _verdict(points, 0.3, has_head=False) == "too few calibration prompts for a conclusion"
