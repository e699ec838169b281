"""Compute rewards from raw scores: normalise, combine, and derive preferences.

Pure NumPy. A matrix has one row per prompt and one column per teacher; NaN marks a missing cell.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.float64]
"""(P, T) numbers of P prompts and T teachers, NaN where missing."""

Indices: TypeAlias = NDArray[np.intp]

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
                  the normalisation of its row. NaN also where no other response to the prompt has both scores:
                  a reward compares responses, and as a 0 it would lower the mean of a teacher for the failures
                  of the others.
    """
    if quality.shape != learnability.shape:
        raise ValueError(f"shapes differ: quality {quality.shape}, learnability {learnability.shape}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be within [0, 1], got {alpha}")
    missing = np.isnan(quality) | np.isnan(learnability)
    missing |= (~missing).sum(axis=1, keepdims=True) == 1
    quality, learnability = (np.where(missing, np.nan, scores) for scores in (quality, learnability))
    return (1.0 - alpha) * normalise(quality, how) + alpha * normalise(learnability, how)


def preferences(rewards: Matrix) -> tuple[Indices, Indices, Indices]:
    """List every pair of teachers whose rewards for a prompt are present and distinct.

    rewards: (P, T).
    returns: (prompt, winner, loser), each (N,): row and column indices of `rewards`, in prompt order.
    """
    better = rewards[:, :, None] > rewards[:, None, :]  # False for NaN
    prompt, winner, loser = np.nonzero(better)
    return prompt, winner, loser


def static_ranking(rewards: Matrix) -> NDArray[np.float64]:
    """Rank teachers independently of the prompt: mean reward over the informative prompts.

    A prompt with equal rewards gives 0 to every teacher that answered it, and would count against the teachers with
    the most responses. On a complete grid, leaving such prompts out does not change the order.

    rewards: (P, T), normalised.
    returns: (T,); NaN for a teacher without any reward.
    """
    is_informative = informative(rewards)
    means, all_means = column_means(rewards[is_informative]), column_means(rewards)
    return np.where(np.isnan(means), all_means, means)


def informative(rewards: Matrix) -> NDArray[np.bool_]:
    """(P,) whether a prompt has two distinct rewards."""
    lowest, highest = _extremes(rewards)
    return np.asarray(highest > lowest)[:, 0]


def column_means(values: Matrix) -> NDArray[np.float64]:
    """(T,) means over the present cells; NaN for a column without any."""
    count = (~np.isnan(values)).sum(axis=0)
    return np.asarray(np.divide(np.nansum(values, axis=0), count, out=np.full(len(count), np.nan), where=count > 0))


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
    present = ~np.isnan(scores)
    count = np.maximum(present.sum(axis=1, keepdims=True), 1)
    centred = np.where(present, scores, 0.0)
    centred = np.where(present, scores - centred.sum(axis=1, keepdims=True) / count, 0.0)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return np.asarray(np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0))


def _rank(scores: Matrix) -> Matrix:
    below = (scores[:, :, None] > scores[:, None, :]).sum(axis=2)
    equal = (scores[:, :, None] == scores[:, None, :]).sum(axis=2) - 1
    others = np.maximum((~np.isnan(scores)).sum(axis=1, keepdims=True) - 1, 1)
    return np.asarray((below + equal / 2) / others)
