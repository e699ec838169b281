"""Compute rewards from raw scores: normalise, combine, and derive preferences.

Pure NumPy. A matrix has one row per prompt and one column per teacher; NaN marks a missing cell.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.float64]
"""(P, T) numbers of P prompts and T teachers, NaN where missing."""

Indices: TypeAlias = NDArray[np.intp]

Samples: TypeAlias = NDArray[np.float64]
"""(P, T, n) numbers of n samples of each cell, NaN where missing."""

Normalisation: TypeAlias = Literal["minmax", "zscore", "rank"]


def normalise(scores: Matrix, how: Normalisation) -> Matrix:
    """Bring each prompt's scores to a common scale across the teachers that have one.

    scores:  (P, T) in the scorer's own unit.
    how:     "minmax" (0 to 1), "zscore" (standard deviations from the prompt's mean) or
             "rank" (0 for the lowest to 1 for the highest; equal scores share their mean rank).
    returns: (P, T); a row of equal scores, or with a single score, becomes zeros; NaN stays NaN.
    """
    if how not in get_args(Normalisation):
        raise ValueError(f"how must be one of {', '.join(get_args(Normalisation))}, got {how!r}")
    if np.isinf(scores).any():
        raise ValueError("scores must be finite, or NaN where missing; got an infinite one")
    lowest, highest = _extremes(scores)
    differ = highest > lowest  # exact; the standard deviation of equal floats may differ from 0
    scaled = {"minmax": _minmax, "zscore": _zscore, "rank": _rank}[how](scores)
    return np.where(np.isnan(scores), np.nan, np.where(differ, scaled, 0.0))


def combine(quality: Matrix, learnability: Matrix, *, alpha: float, how: Normalisation) -> Matrix:
    """Combine quality and learnability into the reward of each response.

    quality:      (P, T) the quality scorer's raw value.
    learnability: (P, T) mean log-likelihood under the student, nats per token.
    alpha:        weight of learnability, 0 (quality only) to 1 (learnability only).
    how:          see `normalise`.
    returns:      (P, T) reward; NaN where either score is missing, and such a cell is excluded from
                  the normalisation of its row. At alpha 0, only quality has to be there. NaN also where no other
                  response to the prompt has both: a reward compares responses, and as a 0 it would lower the mean of
                  a teacher for the failures of the others.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be within [0, 1], got {alpha}")
    quality, learnability = _compared(quality, learnability, alpha)
    return (1.0 - alpha) * normalise(quality, how) + alpha * normalise(learnability, how)


def sample_means(values: Samples) -> Matrix:
    """(P, T) means over the present samples of each cell; NaN for a cell without any.

    Cells with the same values have exactly the same mean, in whatever order the samples are.
    """
    values = np.sort(values, axis=2)
    count = (~np.isnan(values)).sum(axis=2)
    return np.asarray(np.divide(np.nansum(values, axis=2), count, out=np.full(count.shape, np.nan), where=count > 0))


def sample_errors(values: Samples) -> Matrix:
    """(P, T) standard errors of `sample_means`; 0 for cells without a value, and everywhere if no cell has two.

    Each cell's variance is moderated by the pooled variance of all cells, which counts like one more sample: a few
    equal samples do not make a cell certain.
    """
    present = ~np.isnan(values)
    count = present.sum(axis=2)
    squares = np.where(present, (values - sample_means(values)[:, :, None]) ** 2, 0.0).sum(axis=2)
    freedom = np.maximum(count - 1, 0).sum()
    if not freedom:
        return np.zeros(count.shape)
    variance = (squares + squares.sum() / freedom) / np.maximum(count, 1)
    return np.asarray(np.where(count > 0, np.sqrt(variance / np.maximum(count, 1)), 0.0))


def combine_errors(
    quality: Matrix,
    learnability: Matrix,
    quality_errors: Matrix,
    learnability_errors: Matrix,
    *,
    alpha: float,
    how: Normalisation,
) -> Matrix:
    """(P, T) standard errors of the rewards of `combine`, to first order; 0 where there is no reward.

    The errors of quality and learnability count as independent, and the scale of a row as known.

    quality_errors, learnability_errors: (P, T) standard errors of the raw scores, see `sample_errors`.
    """
    quality, learnability = _compared(quality, learnability, alpha)
    of_quality = _normalised_errors(quality, quality_errors, how)
    of_learnability = _normalised_errors(learnability, learnability_errors, how)
    return np.asarray(np.hypot((1.0 - alpha) * of_quality, alpha * of_learnability))


def preferences(rewards: Matrix) -> tuple[Indices, Indices, Indices]:
    """List every pair of teachers whose rewards for a prompt are present and distinct.

    rewards: (P, T).
    returns: (prompt, winner, loser), each (N,): row and column indices of `rewards`, in prompt order.
    """
    better = rewards[:, :, None] > rewards[:, None, :]  # False for NaN
    prompt, winner, loser = np.nonzero(better)
    return prompt, winner, loser


def preference_weights(rewards: Matrix, how: str, errors: Matrix | None = None) -> NDArray[np.float64]:
    """(P, T, T) weight of each preference of one teacher (axis 1) over another (axis 2).

    how:    "weighted" by the difference of the rewards, or "equal": 1 each.
    errors: (P, T) standard errors of the rewards; None or 0 means that they are exact. The true difference is then
            normally distributed around the observed one, and each direction has its expected weight: the mean of the
            difference's positive part, or the probability that it is positive. Equal rewards are no preference.
    """
    gaps = rewards[:, :, None] - rewards[:, None, :]
    weights = np.where(gaps > 0, gaps if how == "weighted" else 1.0, 0.0)  # False for NaN
    if errors is None:
        return weights
    spread = np.hypot(errors[:, :, None], errors[:, None, :])
    unsure = np.nonzero((spread > 0) & ~np.isnan(gaps) & (gaps != 0))
    gap, scale = gaps[unsure], spread[unsure]
    chance = _normal(gap / scale)
    density = np.exp(-((gap / scale) ** 2) / 2) / math.sqrt(2 * math.pi)
    # The difference is rounded for gaps of many errors.
    weights[unsure] = np.maximum(gap * chance + scale * density, 0.0) if how == "weighted" else chance
    return weights


def static_ranking(rewards: Matrix) -> NDArray[np.float64]:
    """Rank teachers independently of the prompt: mean reward over the informative prompts.

    A prompt with equal rewards gives 0 to every teacher that answered it, and would count against the teachers with
    the most responses. On a complete grid, leaving such prompts out does not change the order.

    rewards: (P, T), normalised.
    returns: (T,); NaN for a teacher without any reward.
    """
    return ranking_of(column_means(rewards[informative(rewards)]), column_means(rewards))


def ranking_of(informative_means: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """`static_ranking` from a teacher's means over the informative prompts and over all, (T,) each."""
    return np.where(np.isnan(informative_means), means, informative_means)


def informative(rewards: Matrix) -> NDArray[np.bool_]:
    """(P,) whether a prompt has two distinct rewards."""
    lowest, highest = _extremes(rewards)
    return np.asarray(highest > lowest)[:, 0]


def column_means(values: Matrix) -> NDArray[np.float64]:
    """(T,) means over the present cells; NaN for a column without any."""
    means = RunningMeans()
    means.add(values)
    return means.found


class RunningMeans:
    """Means over the present cells of matrices that are added one after the other."""

    def __init__(self) -> None:
        self._sums = np.zeros(())
        self._counts = np.zeros(())

    def add(self, values: Matrix) -> None:
        """Add the cells of a (P, T) matrix."""
        self._sums = self._sums + np.nansum(values, axis=0)
        self._counts = self._counts + (~np.isnan(values)).sum(axis=0)

    @property
    def found(self) -> NDArray[np.float64]:
        """(T,) means; NaN for a column without any cell, and a scalar NaN before the first matrix."""
        nothing = np.full(self._counts.shape, np.nan)
        return np.asarray(np.divide(self._sums, self._counts, out=nothing, where=self._counts > 0))


def _compared(quality: Matrix, learnability: Matrix, alpha: float) -> tuple[Matrix, Matrix]:
    """Both scores, NaN where either is missing, and where no other response to the prompt has both.

    At alpha 0 nobody has to know the learnability: it is 0 where quality is there.
    """
    if quality.shape != learnability.shape:
        raise ValueError(f"shapes differ: quality {quality.shape}, learnability {learnability.shape}")
    if alpha == 0.0:
        learnability = np.zeros_like(quality)
    missing = np.isnan(quality) | np.isnan(learnability)
    missing |= (~missing).sum(axis=1, keepdims=True) == 1
    return np.where(missing, np.nan, quality), np.where(missing, np.nan, learnability)


def _normalised_errors(scores: Matrix, errors: Matrix, how: Normalisation) -> Matrix:
    """(P, T) standard errors of `normalise`; 0 in a row of equal scores, and where a score is missing."""
    lowest, highest = _extremes(scores)
    if how == "rank":
        found = _rank_errors(scores, errors)
    else:
        scale = highest - lowest if how == "minmax" else _deviation(scores)
        found = np.divide(errors, scale, out=np.zeros_like(scores), where=scale > 0)
    return np.where((highest > lowest) & ~np.isnan(scores), found, 0.0)


def _rank_errors(scores: Matrix, errors: Matrix) -> Matrix:
    """A rank is a mean of comparisons, each with the variance of a coin of known bias."""
    gaps, spread = scores[:, :, None] - scores[:, None, :], np.hypot(errors[:, :, None], errors[:, None, :])
    unsure = np.nonzero((spread > 0) & ~np.isnan(gaps) & ~np.eye(scores.shape[1], dtype=np.bool_))
    variance = np.zeros(gaps.shape)
    chance = _normal(gaps[unsure] / spread[unsure])
    variance[unsure] = chance * (1.0 - chance)
    return np.asarray(np.sqrt(variance.sum(axis=2)) / _others(scores))


def _normal(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard normal distribution function."""
    return np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in x.tolist()], dtype=np.float64)


def _extremes(scores: Matrix) -> tuple[Matrix, Matrix]:
    """Lowest and highest present score of each row, (P, 1) each; NaN for an empty row."""
    present = ~np.isnan(scores)
    lowest = np.min(scores, axis=1, keepdims=True, initial=np.inf, where=present)
    highest = np.max(scores, axis=1, keepdims=True, initial=-np.inf, where=present)
    return lowest, highest


def _minmax(scores: Matrix) -> Matrix:
    lowest, highest = _extremes(scores)
    spread = np.where(highest > lowest, highest - lowest, 1.0)
    return np.asarray((scores - lowest) / spread)


def _zscore(scores: Matrix) -> Matrix:
    centred, deviation = _centred(scores), _deviation(scores)
    return np.asarray(np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0))


def _centred(scores: Matrix) -> Matrix:
    """Scores minus their row's mean; 0 where missing."""
    present = ~np.isnan(scores)
    mean = np.where(present, scores, 0.0).sum(axis=1, keepdims=True) / np.maximum(present.sum(axis=1, keepdims=True), 1)
    return np.where(present, scores - mean, 0.0)


def _deviation(scores: Matrix) -> Matrix:
    """(P, 1) standard deviations of the rows."""
    count = np.maximum((~np.isnan(scores)).sum(axis=1, keepdims=True), 1)
    return np.asarray(np.sqrt((_centred(scores) ** 2).sum(axis=1, keepdims=True) / count))


def _rank(scores: Matrix) -> Matrix:
    below = (scores[:, :, None] > scores[:, None, :]).sum(axis=2)
    equal = (scores[:, :, None] == scores[:, None, :]).sum(axis=2) - 1
    return np.asarray((below + equal / 2) / _others(scores))


def _others(scores: Matrix) -> NDArray[np.intp]:
    """(P, 1) how many others a present score of the row is compared with; at least 1."""
    return np.asarray(np.maximum((~np.isnan(scores)).sum(axis=1, keepdims=True) - 1, 1))
