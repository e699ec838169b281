"""Judge which definition of the reward predicts what a student becomes, from students that were trained for that.

Each of M students was trained on other responses to the same prompts. A definition predicts if the students of the
responses that it rewards more became better: its rank correlation (Spearman's) with the measured scores is above 0.
Pure NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from persyn.method import intervals
from persyn.method.intervals import LEVEL, Interval, Vector
from persyn.method.rewards import Indices, Matrix

Outcome: TypeAlias = Literal["predicts", "no definition predicts", "cannot tell"]
Reason: TypeAlias = Literal["", "few students", "no difference", "wide intervals"]

#: With fewer students, a rank correlation says nothing: of 5 in random order, one order in 120 agrees by chance, and
#: many definitions are compared.
LEAST_STUDENTS = 6
#: A definition whose correlation is likely below this is of no use to choose between datasets.
USEFUL = 0.5
#: Resamples computed at once.
_AT_ONCE = 200


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """M students, judged by D definitions.

    predicted: (D, M) mean reward, under each definition, of the responses that each student was trained on.
    measured:  (M, H) score of each student on H prompts that it was not trained on, NaN where there is none.
    units:     (M,) the source of each student's responses, 0 to U - 1: a teacher, or a learnability at all weights.
               Students of the same source resemble each other, so that they count as one observation.
    own:       the index of the run's own definition.
    """

    predicted: Matrix
    measured: Matrix
    units: Indices
    own: int


class Prediction(Struct, frozen=True):
    """Whether a definition predicts, and which one to take.

    Bounds allow for the choice of the best of D definitions; the intervals of single correlations do not.
    """

    outcome: Outcome
    #: Why nothing can be told; else empty.
    reason: Reason
    #: The index of the definition with the highest correlation, the run's own if that is as high.
    best: int
    #: Lower bound of the best definition's correlation, and upper bound of every definition's.
    low: float
    high: float
    #: (D,) of each definition; None where it gives the same reward to all students, or these have the same score.
    correlations: list[Interval | None]
    #: How much better than the run's own definition the best one predicts; `low` is a bound as above.
    gain: Interval
    #: Variance of the students' measured scores relative to that by the choice of the prompts; 1 if they do not differ.
    contrast: float


def spearman(predicted: Matrix, measured: Vector) -> Vector:
    """(D,) rank correlations of (D, M) predicted with (M,) measured scores; NaN where either are all equal.

    Equal scores share their mean rank.
    """
    return np.asarray(_correlations(predicted, measured[None], np.ones((1, len(measured))))[0])


def _correlations(predicted: Matrix, measured: Matrix, weights: Matrix) -> Matrix:
    """(B, D) rank correlations of (D, M) predicted with (B, M) measured scores, of students with (B, M) weights."""
    total = weights.sum(axis=1, keepdims=True)

    def centred(ranks: Matrix) -> Matrix:
        return np.asarray(ranks - (weights * ranks).sum(axis=1, keepdims=True) / total)

    of_measured = centred(np.einsum("bij,bj->bi", _above(measured), weights))
    found = np.full((len(measured), len(predicted)), np.nan)
    for place, row in enumerate(predicted):
        ranks = centred(weights @ _above(row).T)
        scale = np.sqrt((weights * ranks**2).sum(axis=1) * (weights * of_measured**2).sum(axis=1))
        np.divide((weights * ranks * of_measured).sum(axis=1), scale, out=found[:, place], where=scale > 0)
    return found


def _above(scores: Matrix) -> Matrix:
    """(..., M, M) 1 where the first of two students has the higher score, 0.5 where both have the same."""
    first, second = scores[..., :, None], scores[..., None, :]
    return np.asarray((first > second) + 0.5 * (first == second))


def judge(trained: Trained) -> Prediction:
    """Judge definitions; raise `ValueError` when no student has a measured score."""
    scores = means(trained.measured)
    if np.isnan(scores).any():
        raise ValueError("a student has no measured score")
    found = spearman(trained.predicted, scores)
    known = np.nan_to_num(found)
    best = trained.own if known[trained.own] >= known.max() else int(known.argmax())
    drawn, score_draws = resampled(trained)
    gains = drawn - drawn[:, [trained.own]]
    lows, highs = _bounds(drawn, known)
    low, high = float(lows[best]), float(highs.max())
    gain = float(known[best] - known[trained.own])
    contrast = _contrast(scores, score_draws)
    outcome, reason = _outcome(len(scores), contrast, low, high)
    gain_low = float(_bounds(gains, known - known[trained.own])[0][best])
    return Prediction(
        outcome=outcome,
        reason=reason,
        best=best,
        low=low,
        high=high,
        correlations=[
            None if np.isnan(value) else intervals.interval(float(value), drawn[:, place])
            for place, value in enumerate(found)
        ],
        gain=Interval(gain, gain_low, intervals.interval(gain, gains[:, best]).high),
        contrast=contrast,
    )


def means(measured: Matrix) -> Vector:
    """(M,) means over the prompts with a score; NaN without any."""
    return np.asarray(_weighted(measured, np.ones((1, measured.shape[1])))[0])


def _weighted(measured: Matrix, weights: Matrix) -> Matrix:
    """(B, M) means of (M, H) scores with each of (B, H) weights; NaN without any score."""
    sums, counts = weights @ np.nan_to_num(measured).T, weights @ (~np.isnan(measured)).T.astype(np.float64)
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def resampled(trained: Trained) -> tuple[Matrix, Matrix]:
    """(B, D) correlations and (B, M) scores in bootstrap resamples of prompts and, for the correlations, of sources.

    A resample in which a correlation is undefined counts as 0.
    """
    n_units = int(trained.units.max()) + 1
    of_units = np.concatenate(list(intervals.weights(n_units, seed=1)))  # (B, U)
    of_prompts = intervals.weights(trained.measured.shape[1], seed=0)
    scores = np.concatenate([_weighted(trained.measured, piece) for piece in of_prompts])
    scores = np.where(np.isnan(scores), means(trained.measured), scores)
    of_students = of_units[:, trained.units]
    found = [
        _correlations(trained.predicted, scores[first : first + _AT_ONCE], of_students[first : first + _AT_ONCE])
        for first in range(0, len(scores), _AT_ONCE)
    ]
    return np.nan_to_num(np.concatenate(found)), scores


def _bounds(drawn: Matrix, found: Vector) -> tuple[Vector, Vector]:
    """(D,) lower and upper bounds that all hold at once with probability `LEVEL`.

    Quantiles of the draws, at the level at which all of them hold together (calibrated quantiles, Montiel Olea and
    Plagborg-Moller 2019, doi:10.1002/jae.2656). A value is within its bounds.
    """
    places = (drawn.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") + 0.5) / len(drawn)
    tail = (1 - LEVEL) / 2
    below, above = np.quantile(places.min(axis=1), tail), np.quantile(places.max(axis=1), 1 - tail)
    return (
        np.minimum(np.quantile(drawn, below, axis=0), found),
        np.maximum(np.quantile(drawn, above, axis=0), found),
    )


def _contrast(scores: Vector, drawn: NDArray[np.float64]) -> float:
    """The variance of M scores divided by the part of it that the choice of the prompts explains; 1 without either."""
    if len(scores) < 2 or not np.ptp(scores):
        return 1.0
    errors = drawn - scores
    errors -= errors.mean(axis=1, keepdims=True)
    noise = float((errors**2).sum(axis=1).mean()) / (len(scores) - 1)
    return float(scores.var(ddof=1)) / noise if noise > 0 else float("inf")


def _outcome(n_students: int, contrast: float, low: float, high: float) -> tuple[Outcome, Reason]:
    if n_students < LEAST_STUDENTS:
        return "cannot tell", "few students"
    # Two standard deviations above what students without a difference have: chi-squared over its degrees of freedom.
    if contrast <= 1 + 2 * np.sqrt(2 / (n_students - 1)):
        return "cannot tell", "no difference"
    if low > 0:
        return "predicts", ""
    return ("no definition predicts", "") if high < USEFUL else ("cannot tell", "wide intervals")
