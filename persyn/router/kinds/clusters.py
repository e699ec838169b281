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

#: The number of clusters; shrinkage merges those that do not differ.
N_CLUSTERS = 30
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
        """Nothing is chosen by cross-validation."""
        return {}

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
                    label = str(group) if name == CLUSTER else self.design.labels[name][group]
                    scores = [round(float(effect), 4) for effect in self.effects[name][group]]
                    found[row].append(Group(name, label, int(self.sizes[name][group]), scores))
        return found

    def _groups(self, prompts: Prompts) -> Iterator[tuple[str, Indices]]:
        """(P,) the number of each prompt's group, -1 without one, by field."""
        if len(self.centres):
            yield CLUSTER, _nearest(self.design.states(prompts), self.centres)
        for name, labels in self.design.labels.items():
            yield name, numbered(prompts.fields[name], labels)


def fit(prompts: Prompts, examples: Examples, *, tick: Tick = quietly, settings: Values | None = None) -> Clusters:
    """Estimate the effects of one field after the other, each on what the ones before leave."""
    known = deviations.of(examples)
    made = design.fit(prompts if prompts.fields else Prompts(prompts.states))
    centres = np.zeros((0, 0)) if prompts.fields else _centres(made.states(prompts), examples.seed)
    empty = Clusters(made, known.means, {}, {}, centres)
    effects, sizes, left = {}, {}, known.values
    for name, groups in empty._groups(prompts.take(known.rows)):
        n_groups = len(centres) if name == CLUSTER else len(made.labels[name])
        effects[name], sizes[name] = shrunk(left, known.weights, groups, n_groups)
        left = left - np.where(known.weights > 0, _looked_up(effects[name], groups), 0.0)
        tick()
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


def shrunk(values: Matrix, weights: Matrix, groups: Indices, n_groups: int) -> tuple[Matrix, Vector]:
    """Empirical Bayes means of each group: (L, K), shrunk towards 0, and (L,) sizes of the groups.

    A group's true mean has variance t between groups, and the mean of n values is off by variance s / n. The best
    guess is the observed mean times n t / (n t + s) (Efron and Morris 1975); t and s are estimated by moments, from
    E[n mean^2] = s + n t, and t is common to all teachers.

    values, weights: (Q, K). groups: (Q,) 0 to L - 1, or -1.
    """
    member = (groups[:, None] == np.arange(n_groups)).astype(np.float64)  # (Q, L)
    count = member.T @ weights  # (L, K)
    total = member.T @ (weights * values)
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    inside = weights * (groups >= 0)[:, None]
    spread = (inside * (values - _looked_up(mean, groups)) ** 2).sum(axis=0)
    within = spread / np.maximum((count - (count > 0)).sum(axis=0), 1.0)  # (K,)
    between = ((count * mean**2 - within) * (count > 0)).sum() / max(count.sum(), 1.0)
    if not between > 0:
        return np.zeros_like(mean), member.sum(axis=0)
    return mean * (count * between) / (count * between + np.maximum(within, 1e-12)), member.sum(axis=0)


def numbered(labels: Sequence[str | None], known: Sequence[str]) -> Indices:
    """(P,) the place of each label among the known ones, -1 where it is none of them."""
    places = {label: place for place, label in enumerate(known)}
    return np.array([-1 if label is None else places.get(label, -1) for label in labels], dtype=np.intp)


def _looked_up(table: Matrix, groups: Indices) -> Matrix:
    """(P, K) rows of a table (L, K); 0 for group -1."""
    return np.vstack([table, np.zeros((1, table.shape[1]))])[groups]


def _centres(states: Matrix, seed: int) -> Matrix:
    """(L, D) centres of k-means, at most `N_CLUSTERS`, and on average at least five prompts each."""
    from sklearn.cluster import KMeans

    n_clusters = min(N_CLUSTERS, len(np.unique(states, axis=0)), max(len(states) // 5, 1))
    return np.asarray(KMeans(n_clusters, n_init=3, random_state=seed).fit(states).cluster_centers_)


def _nearest(states: Matrix, centres: Matrix) -> NDArray[np.intp]:
    return np.asarray(((centres**2).sum(axis=1) - 2.0 * states @ centres.T).argmin(axis=1))
