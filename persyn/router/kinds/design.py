"""The design matrix: states on a common scale, and labels as indicators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix
from persyn.router.kinds.base import Arrays, Prompts, Values

#: Relative spread below which a state counts as constant, as float32 resolves no less.
_RESOLUTION = 1e-6
#: A label with this many prompts has half the squared weight of a frequent one.
PRIOR = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Maps prompts to rows of D numbers; the states of an encoder have a mean square length of 1, an indicator up to 1.

    means, scales: (H,) of each encoder's states. labels: the known labels of each field, most frequent first.
    weights: (L,) of the indicators: less for a rare label, so that a penalty holds it back more.
    """

    means: Mapping[str, Vector]
    scales: Mapping[str, Vector]
    labels: Mapping[str, Sequence[str]]
    weights: Mapping[str, Vector]

    @property
    def width(self) -> int:
        """D."""
        return sum(map(len, self.means.values())) + sum(map(len, self.labels.values()))

    def encode(self, prompts: Prompts) -> Matrix:
        """(P, D) states and indicators."""
        return np.hstack([self.states(prompts), self.indicators(prompts)])

    def states(self, prompts: Prompts) -> Matrix:
        """(P, H) standardised states of all encoders, divided by the square root of their number."""
        parts = [(prompts.states[name] - mean) / self.scales[name] for name, mean in self.means.items()]
        return np.hstack([np.zeros((len(prompts), 0)), *parts])

    def indicators(self, prompts: Prompts) -> Matrix:
        """(P, L) the weight of each label that a prompt has, else 0; an unknown label is none."""
        parts = [self._indicators(name, labels, prompts.fields[name]) for name, labels in self.labels.items()]
        return np.hstack([np.zeros((len(prompts), 0)), *parts])

    def _indicators(self, name: str, labels: Sequence[str], given: Sequence[str | None]) -> Matrix:
        found, groups = np.zeros((len(given), len(labels))), numbered(given, labels)
        rows = np.flatnonzero(groups >= 0)
        found[rows, groups[rows]] = self.weights[name][groups[rows]]
        return found

    def state(self) -> tuple[Arrays, Values]:
        """Means, scales and weights; labels."""
        parts = {"mean": self.means, "scale": self.scales, "weight": self.weights}
        arrays = {f"{part}.{name}": array for part, given in parts.items() for name, array in given.items()}
        return arrays, {"labels": dict(self.labels)}


def fit(prompts: Prompts) -> Design:
    """Measure the states, and count the labels."""
    means = {name: states.mean(axis=0, dtype=np.float64) for name, states in prompts.states.items()}
    scales = {name: _scale(states, means[name]) for name, states in prompts.states.items()}
    counts = {name: Counter(label for label in given if label is not None) for name, given in prompts.fields.items()}
    labels = {name: _known(count) for name, count in counts.items()}
    sizes = {name: np.array([counts[name][label] for label in given], float) for name, given in labels.items()}
    return Design(means, scales, labels, {name: np.sqrt(size / (size + PRIOR)) for name, size in sizes.items()})


def _known(counts: Counter[str]) -> list[str]:
    """The labels of several prompts: nothing is known of a single one's, and a field of ids has only such."""
    return sorted((label for label, n in counts.items() if n > 1), key=lambda label: (-counts[label], label))


def restore(arrays: Arrays, values: Values) -> Design:
    """From a state."""
    parts: dict[str, dict[str, Vector]] = {"mean": {}, "scale": {}, "weight": {}}
    for name, array in arrays.items():
        part, _, of = name.partition(".")
        if part in parts and of:
            parts[part][of] = np.asarray(array)
    return Design(parts["mean"], parts["scale"], values["labels"], parts["weight"])


def numbered(labels: Sequence[str | None], known: Sequence[str]) -> Indices:
    """(P,) the place of each label among the known ones, -1 where it is none of them."""
    places = {label: place for place, label in enumerate(known)}
    return np.array([-1 if label is None else places.get(label, -1) for label in labels], dtype=np.intp)


def unit(rows: Matrix) -> Matrix:
    """Rows of length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0))


def _scale(states: Matrix, mean: Vector) -> Vector:
    deviation = states.std(axis=0, dtype=np.float64)
    varies = deviation > _RESOLUTION * np.abs(mean)
    return np.where(varies, deviation, 1.0) * math.sqrt(states.shape[1])
