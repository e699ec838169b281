"""How good a router is on prompts that it was not fitted to, beside the static and the random choice.

Pure NumPy; knows no model. On every prompt the choice is among the teachers whose reward is
present there: nothing is known about the others. A prompt without any reward is left out. A
prompt on which all rewards are equal cannot be routed wrongly, so it counts for the mean reward
and is left out of the hit rates; `n_tied` says how many there are.
"""

from __future__ import annotations

from math import comb
from typing import TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from persyn.method import rewards as reward_matrix
from persyn.method.rewards import Matrix

#: Of win probabilities from 0.5 to 1.
_BINS = 10

Metrics: TypeAlias = dict[str, float | int | None]
"""hit1, hit3, pair_accuracy (0 to 1), routed_reward, regret (in units of the reward); None of no prompt.

hit3 is None of three teachers or fewer, where it is 1 whatever the scores.
"""


def compare(scores: Matrix, rewards: Matrix, calibration: Matrix, *, preferences: str) -> dict[str, Metrics]:
    """The router's metrics beside those of choices that know less, and of the one that knows all.

    scores:      (P, T) the router's, of the hold-out prompts.
    rewards:     (P, T) of the same prompts, NaN where missing.
    calibration: (C, T) rewards the router was fitted to, from which the static ranking is taken.
    preferences: how they counted in the fit, "weighted" or "equal".
    returns:     "router", "static" (one ranking for every prompt), "random" (expected value) and "oracle".
    """
    return {
        "router": {
            **evaluate(scores, rewards),
            "calibration_error": calibration_error(scores, rewards, preferences=preferences),
        },
        "static": evaluate(np.broadcast_to(_ranking(calibration), rewards.shape), rewards),
        "random": evaluate_random(rewards),
        "oracle": evaluate(np.nan_to_num(rewards), rewards),
    }


def evaluate(scores: Matrix, rewards: Matrix) -> Metrics:
    """Metrics of choosing by score; of equal scores the teacher earlier in head order is chosen.

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

    Several teachers may have the best reward; prompts on which all have it do not count.
    """
    informative = ~_tied(rewards)
    scores, rewards = scores[informative], rewards[informative]
    is_best = _ranked(scores, rewards) == _best(rewards)[:, None]
    return _mean(is_best[:, :k].any(axis=1))


def calibration_error(scores: Matrix, rewards: Matrix, *, preferences: str) -> float | None:
    """Expected calibration error of the win probabilities: how far sigmoid(score difference) is from what happens.

    The mean over the bins of `reliability`, weighted by their predictions, of |mean prediction - share that came
    true| (Guo et al. 2017, arXiv 1706.04599).
    """
    bins = reliability(scores, rewards, preferences=preferences)
    total = sum(bin_.weight for bin_ in bins)
    return sum(bin_.weight * abs(bin_.predicted - bin_.came_true) for bin_ in bins) / total if bins else None


class Believed(Struct, frozen=True):
    """Preferences that were predicted about as surely.

    predicted: mean win probability of the teacher the router favours, 0.5 to 1. came_true: the share that it won.
    Both count by weight.
    """

    predicted: float
    came_true: float
    n_preferences: int
    weight: float


def reliability(scores: Matrix, rewards: Matrix, *, preferences: str) -> list[Believed]:
    """How surely preferences were predicted and how often that came true, in `_BINS` bins of equal width.

    Each preference is one prediction, that of the teacher the router favours: 0.5 to 1. Equal scores are half true.
    preferences: how they counted in the fit; where they were weighted, predictions count by the same weights.
    returns:     bins without a prediction are left out.
    """
    prompt, winner, loser = reward_matrix.preferences(rewards)
    margin = scores[prompt, winner] - scores[prompt, loser]
    predicted = 1.0 / (1.0 + np.exp(-np.abs(margin)))
    came_true = (margin > 0) + (margin == 0) / 2
    place = np.minimum(((predicted - 0.5) * 2 * _BINS).astype(np.intp), _BINS - 1)
    weight = rewards[prompt, winner] - rewards[prompt, loser] if preferences == "weighted" else np.ones(len(margin))
    return [
        Believed(
            predicted=float(np.average(predicted[inside], weights=weight[inside])),
            came_true=float(np.average(came_true[inside], weights=weight[inside])),
            n_preferences=int(inside.sum()),
            weight=float(weight[inside].sum()),
        )
        for inside in (place == bin_ for bin_ in range(_BINS))
        if inside.any()
    ]


class Hits(Struct, frozen=True):
    """Hit@k for k = 1, 2, ..., T; of the static ranking and of chance beside the router's."""

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
    """What `evaluate` gives on average over every order of the teachers: exact, nothing is drawn."""
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
    """(T,) what the static choice goes by; a teacher of whom nothing is known comes last."""
    ranking = reward_matrix.static_ranking(calibration)
    return np.where(np.isnan(ranking), -np.inf, ranking)


def _chance(n_present: NDArray[np.intp], n_best: NDArray[np.intp], k: int) -> NDArray[np.float64]:
    """Of n teachers drawn without order, how likely one of the m best is among the first k."""
    pairs = zip(n_present.tolist(), n_best.tolist(), strict=True)
    return np.array([1.0 - comb(n - m, k) / comb(n, min(k, n)) for n, m in pairs])


def _pair_accuracy(scores: Matrix, rewards: Matrix) -> float | None:
    """Share of preferences that the scores order rightly; equal scores are half right."""
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
    """Rows without two distinct rewards."""
    lowest = np.min(rewards, axis=1, initial=np.inf, where=~np.isnan(rewards))
    return np.asarray(_best(rewards) <= lowest)


def _mean(values: NDArray[np.bool_] | NDArray[np.float64]) -> float | None:
    return float(np.mean(values)) if len(values) else None
