"""Measure a router on prompts it was not fitted to, next to static, random and oracle choices.

Pure NumPy; independent of any model. On every prompt the choice is among the teachers whose reward is
present, because nothing is known about the others. A prompt without any reward is left out. A prompt
with equal rewards cannot be routed wrongly: it counts towards the mean reward but not towards the hit
rates; `n_tied` is the number of such prompts.
"""

from __future__ import annotations

from math import comb
from typing import TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from persyn.method import rewards as reward_matrix
from persyn.method.rewards import Matrix

#: Bins of the win probability, from 0.5 to 1.
_BINS = 10

Metrics: TypeAlias = dict[str, float | int | None]
"""hit1, hit3, pair_accuracy (0 to 1), routed_reward, regret (in units of the reward); None without prompts.

hit3 is None with three teachers or fewer, where it would always be 1.
"""


def compare(
    scores: Matrix, rewards: Matrix, calibration: Matrix, *, preferences: str, errors: Matrix | None = None
) -> dict[str, Metrics]:
    """The router's metrics next to those of the static, random and oracle choices.

    scores:      (P, T) the router's scores of the hold-out prompts.
    rewards:     (P, T) of the same prompts, NaN where missing.
    calibration: (C, T) rewards the router was fitted to; the static ranking is computed from them.
    preferences: how preferences were weighted in the fit, "weighted" or "equal".
    errors:      (P, T) standard errors of the rewards; None if unknown.
    returns:     "router", "static" (one ranking for every prompt), "random" (expected value) and "oracle".
    """
    return {
        "router": {
            **evaluate(scores, rewards),
            "calibration_error": calibration_error(scores, rewards, preferences=preferences, errors=errors),
        },
        "static": evaluate(np.broadcast_to(_ranking(calibration), rewards.shape), rewards),
        "random": evaluate_random(rewards),
        "oracle": evaluate(np.nan_to_num(rewards), rewards),
    }


def evaluate(scores: Matrix, rewards: Matrix) -> Metrics:
    """Metrics of choosing the teacher with the highest score; ties go to the first in head order.

    scores:  (P, T); only their order within a prompt matters.
    rewards: (P, T), NaN where missing.
    """
    if scores.shape != rewards.shape:
        raise ValueError(f"shapes differ: scores {scores.shape}, rewards {rewards.shape}")
    known = ~np.isnan(rewards).all(axis=1)
    scores, rewards = scores[known], rewards[known]
    best, tied = _best(rewards), _tied(rewards)
    routed = _ranked(scores, rewards)[:, 0]
    return {
        "hit1": hit_rate(scores, rewards, k=1),
        "hit3": hit_rate(scores, rewards, k=3) if rewards.shape[1] > 3 else None,
        "pair_accuracy": _pair_accuracy(scores, rewards),
        "routed_reward": _mean(routed),
        "regret": _mean(best - routed),
        "n_prompts": len(rewards),
        "n_tied": int(tied.sum()),
    }


def hit_rate(scores: Matrix, rewards: Matrix, *, k: int) -> float | None:
    """Hit@k: how often a teacher with the best reward is among the k with the highest scores.

    Several teachers may share the best reward; prompts on which all rewards are equal are left out.
    """
    informative = ~_tied(rewards)
    scores, rewards = scores[informative], rewards[informative]
    is_best = _ranked(scores, rewards) == _best(rewards)[:, None]
    return _mean(is_best[:, :k].any(axis=1))


def calibration_error(
    scores: Matrix, rewards: Matrix, *, preferences: str, errors: Matrix | None = None
) -> float | None:
    """Expected calibration error of the win probabilities, sigmoid(score difference).

    The mean over the bins of `reliability`, weighted by their predictions, of
    |mean prediction - observed frequency| (Guo et al. 2017, arXiv 1706.04599).
    """
    bins = reliability(scores, rewards, preferences=preferences, errors=errors)
    total = sum(bin_.weight for bin_ in bins)
    return sum(bin_.weight * abs(bin_.predicted - bin_.observed_frequency) for bin_ in bins) / total if bins else None


class Believed(Struct, frozen=True):
    """One bin of a reliability diagram: preferences predicted with about the same probability.

    predicted: mean win probability of the teacher the router favours, 0.5 to 1.
    observed_frequency: the observed frequency with which that teacher won. Both are weighted means.
    """

    predicted: float
    observed_frequency: float
    n_preferences: int
    weight: float


def reliability(scores: Matrix, rewards: Matrix, *, preferences: str, errors: Matrix | None = None) -> list[Believed]:
    """Reliability diagram of the win probabilities, in `_BINS` bins of equal width.

    Each preference is one prediction, for the teacher the router favours: 0.5 to 1. Equal scores count as half correct.
    preferences: how preferences were weighted in the fit; predictions are weighted in the same way.
    errors:      (P, T) standard errors of the rewards; with these, a preference is partly observed in each direction.
    returns:     the bins that contain predictions.
    """
    prompt, winner, loser = reward_matrix.preferences(rewards)
    margin = scores[prompt, winner] - scores[prompt, loser]
    predicted = 1.0 / (1.0 + np.exp(-np.abs(margin)))
    weights = reward_matrix.preference_weights(rewards, preferences, errors)
    won, lost = weights[prompt, winner, loser], weights[prompt, loser, winner]
    weight = won + lost
    observed_frequency = np.where(margin == 0, 0.5, np.where(margin > 0, won, lost) / weight)
    place = np.minimum(((predicted - 0.5) * 2 * _BINS).astype(np.intp), _BINS - 1)
    return [
        Believed(
            predicted=float(np.average(predicted[inside], weights=weight[inside])),
            observed_frequency=float(np.average(observed_frequency[inside], weights=weight[inside])),
            n_preferences=int(inside.sum()),
            weight=float(weight[inside].sum()),
        )
        for inside in (place == bin_ for bin_ in range(_BINS))
        if inside.any()
    ]


class Hits(Struct, frozen=True):
    """Hit@k for k = 1, 2, ..., T of the router, the static ranking and a random choice."""

    n_prompts: int
    router: list[float]
    static: list[float]
    random: list[float]


def hits(scores: Matrix, rewards: Matrix, calibration: Matrix) -> Hits | None:
    """Hit@k for every k; None when all prompts are tied. Arguments as for `compare`."""
    tied = _tied(rewards)
    if tied.all():
        return None
    scores, rewards = scores[~tied], rewards[~tied]
    static = np.broadcast_to(_ranking(calibration), rewards.shape)
    is_best = rewards == _best(rewards)[:, None]
    n_present, n_best = (~np.isnan(rewards)).sum(axis=1), is_best.sum(axis=1)
    ks = range(1, rewards.shape[1] + 1)
    return Hits(
        n_prompts=len(rewards),
        router=[hit_rate(scores, rewards, k=k) or 0.0 for k in ks],
        static=[hit_rate(static, rewards, k=k) or 0.0 for k in ks],
        random=[float(_chance(n_present, n_best, k).mean()) for k in ks],
    )


def evaluate_random(rewards: Matrix) -> Metrics:
    """Expected value of `evaluate` over all orders of the teachers; exact, not sampled."""
    rewards = rewards[~np.isnan(rewards).all(axis=1)]
    best = _best(rewards)
    n_present, n_best = (~np.isnan(rewards)).sum(axis=1), (rewards == best[:, None]).sum(axis=1)
    mean = np.nansum(rewards, axis=1) / n_present
    tied = _tied(rewards)
    has_pairs = len(reward_matrix.preferences(rewards)[0]) > 0
    return {
        "hit1": _mean(_chance(n_present[~tied], n_best[~tied], 1)),
        "hit3": _mean(_chance(n_present[~tied], n_best[~tied], 3)) if rewards.shape[1] > 3 else None,
        "pair_accuracy": 0.5 if has_pairs else None,
        "routed_reward": _mean(mean),
        "regret": _mean(best - mean),
        "n_prompts": len(rewards),
        "n_tied": int(tied.sum()),
    }


def _ranking(calibration: Matrix) -> NDArray[np.float64]:
    """(T,) the static ranking; a teacher without any reward comes last."""
    ranking = reward_matrix.static_ranking(calibration)
    return np.where(np.isnan(ranking), -np.inf, ranking)


def _chance(n_present: NDArray[np.intp], n_best: NDArray[np.intp], k: int) -> NDArray[np.float64]:
    """Probability that one of the m best is among the first k of n teachers in random order."""
    pairs = zip(n_present.tolist(), n_best.tolist(), strict=True)
    return np.array([1.0 - comb(n - m, k) / comb(n, min(k, n)) for n, m in pairs])


def _pair_accuracy(scores: Matrix, rewards: Matrix) -> float | None:
    """Share of preferences that the scores order correctly; equal scores count as half correct."""
    prompt, winner, loser = reward_matrix.preferences(rewards)
    won, lost = scores[prompt, winner], scores[prompt, loser]
    return _mean((won > lost) + (won == lost) / 2)


def _ranked(scores: Matrix, rewards: Matrix) -> Matrix:
    """Each prompt's rewards in the order of the scores, highest first; missing ones come last."""
    order = np.lexsort((-scores, np.isnan(rewards)), axis=1)
    return np.asarray(np.take_along_axis(rewards, order, axis=1))


def _best(rewards: Matrix) -> NDArray[np.float64]:
    return np.asarray(np.max(rewards, axis=1, initial=-np.inf, where=~np.isnan(rewards)))


def _tied(rewards: Matrix) -> NDArray[np.bool_]:
    """(P,) rows without two distinct rewards."""
    lowest = np.min(rewards, axis=1, initial=np.inf, where=~np.isnan(rewards))
    return np.asarray(_best(rewards) <= lowest)


def _mean(values: NDArray[np.bool_] | NDArray[np.float64]) -> float | None:
    return float(np.mean(values)) if len(values) else None
