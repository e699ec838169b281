"""How much better each teacher did on a prompt than its mean reward says: what routers other than the head predict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix, informative
from persyn.router.kinds import tuning
from persyn.router.kinds.base import Examples
from persyn.router.kinds.static import ranking


@dataclass(frozen=True, slots=True, eq=False)
class Deviations:
    """The Q of P prompts whose rewards differ; the others tell nothing about the teachers.

    means:   (K,) the static ranking.
    rows:    (Q,) indices of the prompts.
    rewards: (Q, K) theirs, NaN where missing.
    values:  (Q, K) rewards minus the means and the prompt's own level; 0 where missing.
    weights: (Q, K) 0 where missing, 1 for an exact reward, less for one with an error.
    """

    means: Vector
    rows: Indices
    rewards: Matrix
    values: Matrix
    weights: Matrix

    def best(self, candidates: Iterable[Matrix]) -> int:
        """The place of the best of several out-of-sample predictions (Q, K) of the deviations; see `tuning.best`."""
        return tuning.best((self.means + each for each in candidates), self.rewards)


def of(examples: Examples) -> Deviations:
    """Split rewards into the teachers' means, a level of each prompt, and deviations from both."""
    means = ranking(examples.rewards)
    rows = np.flatnonzero(informative(examples.rewards))
    excess = examples.rewards[rows] - means
    present = ~np.isnan(excess)
    level = np.nansum(excess, axis=1, keepdims=True) / np.maximum(present.sum(axis=1, keepdims=True), 1)
    values = np.where(present, excess - level, 0.0)
    weights = present.astype(np.float64)
    if examples.errors is not None:
        weights *= _reliability(values, np.where(present, examples.errors[rows], 0.0), present.sum())
    return Deviations(means, rows, examples.rewards[rows], values, weights)


def _reliability(values: Matrix, errors: Matrix, n_cells: int) -> Matrix:
    """Variance of the exact deviations over that of the measured ones, by each cell's standard error; 0 to 1."""
    noise = errors**2
    exact = max((values**2).sum() - noise.sum(), 0.1 * (values**2).sum()) / max(n_cells, 1)
    return np.asarray(np.divide(exact, exact + noise, out=np.ones_like(noise), where=exact + noise > 0))
