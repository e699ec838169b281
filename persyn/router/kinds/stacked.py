"""A mix of different routers, with weights that predict the rewards best (stacked regression, Breiman 1996)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix
from persyn.router.kinds import deviations
from persyn.router.kinds.base import (
    Arrays,
    Examples,
    Explanation,
    Mix,
    Part,
    Predictor,
    Prompts,
    RouterKind,
    Values,
    quietly,
)
from persyn.router.kinds.crossfit import Bench


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """Routers by kind, and the weight of each one's scores."""

    members: Mapping[str, Predictor]
    weights: Mapping[str, float]

    @property
    def settings(self) -> Values:
        """Those of the members, and the weights."""
        return {"weights": dict(self.weights), **{name: member.settings for name, member in self.members.items()}}

    def scores(self, prompts: Prompts) -> Matrix:
        """Weighted sum of the members' scores."""
        return mixed({name: member.scores(prompts) for name, member in self.members.items()}, self.weights)

    def state(self) -> tuple[Arrays, Values]:
        """The members' states, their names prefixed."""
        states = {name: member.state() for name, member in self.members.items()}
        arrays = {f"{name}/{key}": array for name, (arrays, _) in states.items() for key, array in arrays.items()}
        return arrays, {
            "weights": dict(self.weights),
            "members": {name: values for name, (_, values) in states.items()},
        }

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """What each member says, the heaviest first."""
        said = {name: member.explain(prompts) for name, member in self.members.items()}
        names = sorted(said, key=lambda name: (-self.weights[name], name))
        return [
            [Mix([Part(name, round(self.weights[name], 4), said[name][row]) for name in names])]
            for row in range(len(prompts))
        ]


def fit(
    kinds: Sequence[RouterKind],
    prompts: Prompts,
    examples: Examples,
    *,
    tick: Tick = quietly,
    settings: Values | None = None,
) -> Predictor:
    """Fit the members and their weights."""
    if settings:
        members = {
            kind.name: kind.fit(prompts, examples, tick=tick, settings=settings[kind.name])
            for kind in kinds
            if kind.name in settings["weights"]
        }
        return Stacked(members, settings["weights"])
    return mix(kinds, Bench(prompts, examples, tick))[0]


def mix(kinds: Sequence[RouterKind], bench: Bench) -> tuple[Predictor, Matrix]:
    """A mix of those of the kinds that can read the prompts, and its out-of-fold scores."""
    found = {kind.name: bench.fitted(kind) for kind in kinds if kind.can_read(bench.prompts)}
    out = {name: scores for name, (_, scores) in found.items()}
    weights = {name: weight for name, weight in best_weights(out, bench.examples).items() if weight > 0}
    members = {name: found[name][0] for name in weights}
    return Stacked(members, weights), mixed(out, weights)


def best_weights(scores: Mapping[str, Matrix], examples: Examples) -> dict[str, float]:
    """Weights of at least 0 for out-of-fold scores (P, K) whose sum is nearest to the rewards, within prompts."""
    from scipy.optimize import nnls

    known = deviations.of(examples)
    if not len(known.rows):
        return dict.fromkeys(scores, 1.0)
    root = np.sqrt(known.weights)
    columns = [(root * _centred(each[known.rows], known.weights)).ravel() for each in scores.values()]
    target = known.values + _centred(np.tile(known.means, (len(known.rows), 1)), known.weights)
    found: Vector = nnls(np.column_stack(columns), (root * target).ravel())[0]
    return dict(zip(scores, found.tolist(), strict=True)) if found.any() else {next(iter(scores)): 1.0}


def mixed(scores: Mapping[str, Matrix], weights: Mapping[str, float]) -> Matrix:
    """(P, K) weighted sum, in the order of the names, so that rounding is the same after a restore."""
    return np.asarray(sum(weights[name] * scores[name] for name in sorted(weights)))


def restore(kinds: Mapping[str, RouterKind], arrays: Arrays, values: Values) -> Stacked:
    """From a state."""
    members = {
        name: kinds[name].restore(
            {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}, of
        )
        for name, of in values["members"].items()
    }
    return Stacked(members, values["weights"])


def _centred(scores: Matrix, weights: Matrix) -> Matrix:
    """Scores less their mean over the present cells of the prompt."""
    present = weights > 0
    count = np.maximum(present.sum(axis=1, keepdims=True), 1)
    return np.asarray(scores - np.where(present, scores, 0.0).sum(axis=1, keepdims=True) / count)
