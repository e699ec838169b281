"""The teachers that did best on the prompt's group: its labels, or its cluster where prompts have no labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix
from persyn.router.kinds import design, deviations
from persyn.router.kinds.base import Arrays, Examples, Explanation, Group, Prompts, Values, quietly
from persyn.router.kinds.design import Design
from persyn.router.kinds.deviations import Deviations

#: Numbers of clusters to choose from, and how many prompts a cluster has at least on average.
COUNTS = (5, 10, 20, 40)
_PROMPTS_A_CLUSTER = 10
#: The name of a cluster's number, in place of a field's.
CLUSTER = "cluster"


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """means: (K,). effects: (L, K) what each label of a field adds, and sizes: (L,) its calibration prompts.

    centres: (L, D) of clusters; none where there are labels.
    """

    design: Design
    means: Vector
    effects: Mapping[str, Matrix]
    sizes: Mapping[str, Vector]
    centres: Matrix

    @property
    def settings(self) -> Values:
        """The number of clusters."""
        return {"count": len(self.centres)}

    def scores(self, prompts: Prompts) -> Matrix:
        """The means and the effects of the prompt's groups; an unknown label has none."""
        found = np.tile(self.means, (len(prompts), 1))
        for name, groups in self._groups(prompts):
            found += _looked_up(self.effects[name], groups)
        return found

    def state(self) -> tuple[Arrays, Values]:
        """Effects and sizes of each field, and centres."""
        arrays, values = self.design.state()
        tables = {f"effects.{name}": table for name, table in self.effects.items()}
        tables |= {f"sizes.{name}": size for name, size in self.sizes.items()}
        return {**arrays, **tables, "means": self.means, "centres": self.centres}, values

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """The prompt's groups."""
        found: list[list[Explanation]] = [[] for _ in range(len(prompts))]
        for name, groups in self._groups(prompts):
            for row, group in enumerate(groups.tolist()):
                if group >= 0:
                    label = self.design.labels[name][group] if name in self.design.labels else str(group)
                    scores = [round(float(effect), 4) for effect in self.effects[name][group]]
                    found[row].append(Group(name, label, int(self.sizes[name][group]), scores))
        return found

    def _groups(self, prompts: Prompts) -> Iterator[tuple[str, Indices]]:
        """(P,) the number of each prompt's group, -1 without one, by field."""
        if len(self.centres):
            yield CLUSTER, _nearest(self.design.states(prompts), self.centres)
        for name, labels in self.design.labels.items():
            yield name, design.numbered(prompts.fields[name], labels)


def fit(prompts: Prompts, examples: Examples, *, tick: Tick = quietly, settings: Values | None = None) -> Clusters:
    """Estimate the effects of one field after the other, each on what the ones before leave."""
    known = deviations.of(examples)
    made = design.fit(prompts if prompts.fields else Prompts(prompts.states))
    centres = np.zeros((0, made.width))
    if not prompts.fields and len(known.rows):
        counts = (settings["count"],) if settings else COUNTS
        centres = _centres(made.states(prompts), known, counts, examples.seed)
    tick()
    empty = Clusters(made, known.means, {}, {}, centres)
    effects, sizes, left = {}, {}, known.values
    for name, groups in empty._groups(prompts.take(known.rows)):
        found = effect_of(left, known.weights, groups, len(centres) or len(made.labels[name]))
        effects[name], sizes[name] = found.shrunk(found.total, found.count), found.sizes
        left = left - np.where(known.weights > 0, _looked_up(effects[name], groups), 0.0)
    return Clusters(made, known.means, effects, sizes, centres)


def restore(arrays: Arrays, values: Values) -> Clusters:
    """From a state."""
    made = design.restore(arrays, values)
    tables: dict[str, dict[str, Any]] = {"effects": {}, "sizes": {}}
    for name, array in arrays.items():
        part, _, field = name.partition(".")
        if part in tables:
            tables[part][field] = array
    return Clusters(
        made, np.asarray(arrays["means"]), tables["effects"], tables["sizes"], np.asarray(arrays["centres"])
    )


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What the group of a prompt adds to each teacher's reward.

    total, count: (L, K) sums of the weighted values of each group, and of the weights. sizes: (L,) prompts.
    within:       (K,) variance inside the groups. between: variance of the groups' true means, of all teachers.
    """

    total: Matrix
    count: Matrix
    sizes: Vector
    within: Vector
    between: float

    def shrunk(self, total: Matrix, count: Matrix) -> Matrix:
        """(N, K) empirical Bayes means (Efron and Morris 1975) for sums of values and of weights.

        A group's true mean has variance t, and the mean of n values is off by variance s / n. The best guess is the
        observed mean times n t / (n t + s). Here s is at least `design.PRIOR` times t, because s and t are those of
        frequent groups: where these are uniform, a single prompt would otherwise move the scores as much as many.
        """
        weight = count * self.between + np.maximum(self.within, max(design.PRIOR * self.between, 1e-12))
        return np.asarray(total * self.between / weight)

    def left_out(self, values: Matrix, weights: Matrix, groups: Indices) -> Matrix:
        """(Q, K) effects on each of the prompts, had its own values been unknown."""
        total, count = _looked_up(self.total, groups), _looked_up(self.count, groups)
        own = (groups >= 0)[:, None] * weights
        return self.shrunk(total - own * values, count - own)


def effect_of(values: Matrix, weights: Matrix, groups: Indices, n_groups: int) -> Effect:
    """Estimate the variances by moments, from E[n mean^2] = s + n t.

    values, weights: (Q, K). groups: (Q,) 0 to L - 1, or -1.
    """
    total, count = _summed(weights * values, groups, n_groups), _summed(weights, groups, n_groups)
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    inside = weights * (groups >= 0)[:, None]
    squares = (inside * (values - _looked_up(mean, groups)) ** 2).sum(axis=0)
    within = squares / np.maximum((count - (count > 0)).sum(axis=0), 1.0)
    between = ((count * mean**2 - within) * (count > 0)).sum() / max(count.sum(), 1.0)
    sizes = np.bincount(groups[groups >= 0], minlength=n_groups).astype(np.float64)
    return Effect(total, count, sizes, within, max(float(between), 0.0))


def _summed(values: Matrix, groups: Indices, n_groups: int) -> Matrix:
    """(L, K) sums of the values (Q, K) by group (Q,); group -1 counts for none."""
    sums = np.zeros((n_groups + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums[:n_groups]


def _looked_up(table: Matrix, groups: Indices) -> Matrix:
    """(P, K) rows of a table (L, K); 0 for group -1."""
    return np.vstack([table, np.zeros((1, table.shape[1]))])[groups]


def _centres(states: Matrix, known: Deviations, counts: Sequence[int], seed: int) -> Matrix:
    """(L, D) centres of k-means, in the number that routes best, leaving each prompt out of its cluster's means."""
    from sklearn.cluster import KMeans

    most = max(min(len(np.unique(states, axis=0)), len(states) // _PROMPTS_A_CLUSTER), 1)
    found = [
        np.asarray(KMeans(count, n_init=2, random_state=seed).fit(states).cluster_centers_)
        for count in sorted({min(count, most) for count in counts})
    ]
    return found[known.best(_left_out(states[known.rows], known, centres) for centres in found)]


def _left_out(states: Matrix, known: Deviations, centres: Matrix) -> Matrix:
    groups = _nearest(states, centres)
    effect = effect_of(known.values, known.weights, groups, len(centres))
    return effect.left_out(known.values, known.weights, groups)


def _nearest(states: Matrix, centres: Matrix) -> NDArray[np.intp]:
    return np.asarray(((centres**2).sum(axis=1) - 2.0 * states @ centres.T).argmin(axis=1))
