"""What an assignment costs, and what it has to keep. Pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix

Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What an answer costs: of prompt p and teacher t, fixed[t] + rate[t] * sizes[p].

    fixed: (T,) of the response. rate: (T,) of a unit of the prompt's size. sizes: (P,), such as characters.
    """

    fixed: Vector
    rate: Vector
    sizes: Vector

    def of(self, rows: Any) -> Matrix:
        """(R, T) costs of some rows."""
        return np.asarray(self.fixed + self.sizes[rows][:, None] * self.rate)

    def of_each(self, rows: Indices, columns: Indices) -> Vector:
        """(N,) costs of some cells."""
        return np.asarray(self.fixed[columns] + self.sizes[rows] * self.rate[columns])


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """What an assignment of P prompts has to keep.

    least, most: (T,) prompts of each teacher.
    budget:      of the total cost; infinite where there is none.
    cost_weight: value that a unit of cost has to bring anyway.
    """

    least: Counts
    most: Counts
    budget: float = np.inf
    cost_weight: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What limits are worth: a further prompt for each teacher, (T,), and a further unit of cost, in units of value.

    A teacher's price is above 0 where `most` binds and below 0 where `least` does; the cost's comes on `cost_weight`.
    """

    teachers: Vector
    cost: float


def unlimited(n_prompts: int, n_teachers: int) -> Limits:
    """Limits that every assignment keeps."""
    return Limits(np.zeros(n_teachers, dtype=np.int64), np.full(n_teachers, n_prompts, dtype=np.int64))


def left(whole: Limits, counts: Counts, cost: float) -> Limits:
    """What limits for all prompts leave to the others, after some were assigned: (T,) counts, at a total cost."""
    least, most = np.maximum(whole.least - counts, 0), np.maximum(whole.most - counts, 0)
    return Limits(least, most, max(whole.budget - cost, 0.0), whole.cost_weight)


def conflict(n_prompts: int, limits: Limits, teachers: Sequence[str]) -> str | None:
    """Say which limits on numbers of prompts conflict; None where none do."""
    for least, most, name in zip(limits.least, limits.most, teachers, strict=True):
        if least > most:
            return f"teacher {name} has to answer at least {least:,} of {n_prompts:,} prompts, and at most {most:,}"
    if limits.most.sum() < n_prompts:
        return f"capacity and max_share leave room for {limits.most.sum():,} of {n_prompts:,} prompts"
    if limits.least.sum() > n_prompts:
        return f"min_share is for {limits.least.sum():,} prompts together, and there are {n_prompts:,}"
    return None
