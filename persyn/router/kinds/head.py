"""The router's head, `persyn.router.head`, on frozen states and labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix, informative, preference_weights
from persyn.router.kinds import design, static
from persyn.router.kinds.base import Arrays, Examples, Explanation, Prompts, Values, quietly, unexplained
from persyn.router.kinds.design import Design


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """weight: (K, D) for the design matrix, bias: (K,). penalty: None for the static ranking."""

    design: Design
    weight: Matrix
    bias: Vector
    penalty: float | None

    @property
    def settings(self) -> Values:
        """The penalty."""
        return {"penalty": self.penalty}

    def scores(self, prompts: Prompts) -> Matrix:
        """Log-odds up to a constant of each prompt."""
        return np.asarray(self.design.encode(prompts) @ self.weight.T + self.bias)

    def state(self) -> tuple[Arrays, Values]:
        """The design matrix and the head."""
        arrays, values = self.design.state()
        return {**arrays, "weight": self.weight, "bias": self.bias}, {**values, "penalty": self.penalty}

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """A state's numbers have no names."""
        return unexplained(prompts)


def fit(prompts: Prompts, examples: Examples, *, tick: Tick = quietly, settings: Values | None = None) -> Head:
    """Fit to the prompts whose rewards differ. An indicator of a label is not scaled up, however rare the label is."""
    import torch

    from persyn.router import head

    made = design.fit(prompts)
    rows = np.flatnonzero(informative(examples.rewards))
    if not len(rows):
        return Head(made, np.zeros((examples.rewards.shape[1], made.width)), static.ranking(examples.rewards), None)
    known = examples.take(rows)
    features = torch.from_numpy(made.encode(prompts.take(rows)))
    weights = torch.from_numpy(preference_weights(known.rewards, known.preferences, known.errors))
    with head.threads(features.numel()):
        grid = head.Grid(features, known.rewards, weights, known.preferences)
        penalty = head.choose_penalty(grid, known.seed, tick) if settings is None else settings["penalty"] or math.inf
        weight = head.path(grid, penalty, tick)[-1]
        strengths = grid.strengths
    return Head(made, weight.numpy(), strengths.numpy(), penalty if math.isfinite(penalty) else None)


def restore(arrays: Arrays, values: Values) -> Head:
    """From a state."""
    made = design.restore(arrays, values)
    return Head(made, np.asarray(arrays["weight"]), np.asarray(arrays["bias"]), values["penalty"])
