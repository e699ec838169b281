"""The static router: the teachers' mean rewards, whatever the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix, static_ranking
from persyn.router.kinds.base import Arrays, Examples, Explanation, Prompts, Values, quietly, unexplained


def ranking(rewards: Matrix) -> Vector:
    """(K,) the static ranking; a teacher without a reward ranks with the lowest."""
    found = static_ranking(rewards)
    return np.where(np.isnan(found), np.min(found, where=~np.isnan(found), initial=0.0), found)


@dataclass(frozen=True, slots=True, eq=False)
class Static:
    """(K,) mean rewards."""

    means: Vector

    @property
    def settings(self) -> Values:
        """Nothing is chosen."""
        return {}

    def scores(self, prompts: Prompts) -> Matrix:
        """The same for every prompt."""
        return np.tile(self.means, (len(prompts), 1))

    def state(self) -> tuple[Arrays, Values]:
        """The means."""
        return {"means": self.means}, {}

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """The prompt decides nothing."""
        return unexplained(prompts)


def fit(prompts: Prompts, examples: Examples, *, tick: Tick = quietly, settings: Values | None = None) -> Static:
    """Rank the teachers as the strategy `static` does."""
    return Static(ranking(examples.rewards))


def restore(arrays: Arrays, values: Values) -> Static:
    """From a state."""
    return Static(np.asarray(arrays["means"]))
