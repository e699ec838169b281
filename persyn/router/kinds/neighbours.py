"""The teachers that did best on the most similar calibration prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix
from persyn.router.kinds import design, deviations
from persyn.router.kinds.base import Arrays, Examples, Explanation, Near, Prompts, Values, quietly
from persyn.router.kinds.design import Design
from persyn.router.kinds.deviations import Deviations

#: Numbers of neighbours to choose from.
COUNTS = (320, 160, 80, 40, 20)
#: This many more neighbours with the mean rewards shrink the scores towards the static ranking.
_PRIOR = 20.0
#: How many neighbours an explanation names.
_NAMED = 5


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The calibration prompts whose rewards differ, as points.

    means: (K,). points: (Q, D) of length 1. values, weights: (Q, K), see `Deviations`.
    rows:  (Q,) their indices among the prompts fitted to. count: how many neighbours are asked.
    """

    design: Design
    means: Vector
    points: NDArray[np.float32]
    values: NDArray[np.float32]
    weights: NDArray[np.float32]
    rows: Indices
    count: int

    @property
    def settings(self) -> Values:
        """The number of neighbours."""
        return {"count": self.count}

    def scores(self, prompts: Prompts) -> Matrix:
        """Weighted mean deviation of the neighbours, added to the means."""
        nearest = _nearest(self._similarities(prompts), self.count)
        return np.asarray(self.means + _average(nearest, self.values, self.weights))

    def state(self) -> tuple[Arrays, Values]:
        """Points, values and the number of neighbours."""
        arrays, values = self.design.state()
        names = ("means", "points", "values", "weights", "rows")
        return {**arrays, **{name: getattr(self, name) for name in names}}, {**values, "count": self.count}

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """The nearest calibration prompts."""
        similarities = self._similarities(prompts)
        nearest = _nearest(similarities, _NAMED)
        return [
            self._explained(row, near[near < len(self.rows)]) for row, near in zip(similarities, nearest, strict=True)
        ]

    def _explained(self, similarities: Vector, near: Indices) -> list[Explanation]:
        found = [round(float(each), 3) for each in similarities[near]]
        return [Near(self.rows[near].tolist(), found)] if found else []

    def _similarities(self, prompts: Prompts) -> Matrix:
        return np.asarray(design.unit(self.design.encode(prompts)) @ self.points.T.astype(np.float64))


def fit(prompts: Prompts, examples: Examples, *, tick: Tick = quietly, settings: Values | None = None) -> Neighbours:
    """Choose the number of neighbours by the reward that routing with them has, leaving each prompt out."""
    known = deviations.of(examples)
    made = design.fit(prompts)
    points = design.unit(made.encode(prompts.take(known.rows))).astype(np.float32)
    values, weights = known.values.astype(np.float32), known.weights.astype(np.float32)
    count = settings["count"] if settings else _choose(points, known)
    tick()
    return Neighbours(made, known.means, points, values, weights, known.rows, count)


def restore(arrays: Arrays, values: Values) -> Neighbours:
    """From a state."""
    names = ("means", "points", "values", "weights", "rows")
    kept: dict[str, Any] = {name: arrays[name] for name in names}
    return Neighbours(design.restore(arrays, values), **kept, count=values["count"])


def _choose(points: NDArray[np.float32], known: Deviations) -> int:
    counts = [count for count in COUNTS if count < len(points)] or [max(len(points) - 1, 1)]
    similarities = (points @ points.T).astype(np.float64)
    np.fill_diagonal(similarities, -np.inf)
    nearest = _nearest(similarities, counts[0])
    return counts[known.best(_average(nearest[:, :count], known.values, known.weights) for count in counts)]


def _nearest(similarities: Matrix, count: int) -> Indices:
    """(P, count) indices of the highest similarities (P, Q), highest first; Q where they are not above 0."""
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    is_similar = np.take_along_axis(similarities, nearest, axis=1) > 0
    return np.where(is_similar, nearest, similarities.shape[1])


def _average(nearest: Indices, values: NDArray[Any], weights: NDArray[Any]) -> Matrix:
    """(P, K) shrunk weighted means of the values and weights (Q, K) over the neighbours (P, count)."""
    nobody = np.zeros((1, values.shape[1]))
    total, weight = np.zeros((len(nearest), values.shape[1])), np.zeros((len(nearest), values.shape[1]))
    weighted, weights = np.vstack([weights * values, nobody]), np.vstack([weights, nobody])
    for near in nearest.T:  # one neighbour of every prompt at a time, which needs little memory
        total += weighted[near]
        weight += weights[near]
    return np.asarray(total / (weight + _PRIOR))
