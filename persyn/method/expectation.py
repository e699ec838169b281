"""What reward to expect of a teacher's response, given a router's scores and what such scores have been worth.

Pure NumPy. Scores are log-odds of a higher reward, and may be too sure of themselves. So they are measured against the
rewards of prompts that the router had not seen.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct

from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix
from persyn.method.strategies import Present


class Expectation(Struct, frozen=True, eq=False):
    """The expected reward of teacher t for a prompt: levels[t] + slope * (its score less the prompt's mean score).

    levels: (T,).
    slope:  reward per unit of score (log-odds); 0 where scores are not known to say anything about single prompts.
    fitted, error: the slope before it was shrunk, and its standard error; None without scores.
    """

    levels: Vector
    slope: float = 0.0
    fitted: float | None = None
    error: float | None = None

    def rewards(self, scores: Matrix) -> Matrix:
        """(P, T) expected rewards. scores: (P, T) of the router."""
        return np.asarray(self.levels + self.slope * (scores - scores.mean(axis=1, keepdims=True)))

    @property
    def evidence(self) -> float:
        """By how many standard errors the slope is above 0, before it was shrunk; 0 where it is not."""
        if self.fitted is None or self.error is None or self.fitted <= 0:
            return 0.0
        return self.fitted / self.error if self.error else math.inf


def of_teachers(rewards: Matrix) -> Expectation:
    """What to expect without a router: each teacher's mean reward, adjusted for the prompts that it is known for.

    rewards: (P, T), NaN where missing. Raises `ValueError` for a teacher without rewards to compare it by.
    """
    present = _comparable(~np.isnan(rewards))
    effects = _effects(rewards, present)
    rest = np.where(present, rewards - effects, 0.0)
    return Expectation(effects + float(rest.sum() / present.sum()))


def of_scores(scores: Matrix, rewards: Matrix) -> Expectation:
    """What to expect of scores: regress rewards on them, and shrink the slope by its uncertainty.

    The regression has an effect of each prompt and of each teacher: its slope is what scores say beyond the teachers'
    means. It is multiplied by 1 - (error / slope)^2, or 0 where that is negative: the shrinkage factor of van
    Houwelingen & le Cessie (1990, doi:10.1002/sim.4780091109) for one coefficient.

    scores:  (P, T) by a router that was fitted without the prompt; NaN where there are none.
    rewards: (P, T), NaN where missing. Raises `ValueError` as `of_teachers` does.
    """
    without = of_teachers(rewards)
    present = _comparable(~np.isnan(rewards) & ~np.isnan(scores).any(axis=1, keepdims=True))
    if not present.any():
        return without
    effects = _effects(scores, present)
    given, seen = _within(scores - effects, present), _within(rewards - _effects(rewards, present), present)
    spread = float((given**2).sum())
    if spread <= 1e-12 * present.sum():
        return without
    fitted = float((given * seen).sum()) / spread
    error = float(np.sqrt(((given * (seen - fitted * given)).sum(axis=1) ** 2).sum())) / spread
    slope = fitted * max(0.0, 1.0 - (error / fitted) ** 2) if fitted > 0 else 0.0
    return Expectation(without.levels - slope * effects, slope, fitted, error)


def _comparable(present: Present) -> Present:
    """The cells of prompts with two or more; others say nothing about differences."""
    return np.asarray(present & (present.sum(axis=1, keepdims=True) > 1))


def _effects(values: Matrix, present: Present) -> Vector:
    """(T,) the columns' effects by least squares, with an effect of each row; they sum to 0.

    On a complete matrix, the columns' means less the overall mean. Raises `ValueError` for a column without a value.
    """
    if not present.any(axis=0).all():
        raise ValueError("a teacher has no reward on any calibration prompt that another one has a reward on")
    count = np.maximum(present.sum(axis=1, keepdims=True), 1)
    normal = np.diag(present.sum(axis=0).astype(np.float64)) - (present / count).T @ present
    return np.asarray(np.linalg.pinv(normal, rcond=1e-9, hermitian=True) @ _within(values, present).sum(axis=0))


def _within(values: Matrix, present: Present) -> Matrix:
    """(P, T) values less their row's mean over the present cells; 0 elsewhere."""
    kept = np.where(present, values, 0.0)
    return np.where(
        present, kept - kept.sum(axis=1, keepdims=True) / np.maximum(present.sum(axis=1, keepdims=True), 1), 0.0
    )
