"""The design matrix: states on a common scale, and labels as indicators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix
from persyn.router.kinds.base import Arrays, Prompts, Values

#: Relative spread below which a state counts as constant, as float32 resolves no less.
_RESOLUTION = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Maps prompts to rows of D numbers; the states of an encoder have a mean square length of 1, an indicator 1.

    means, scales: (H,) of each encoder's states. labels: the known labels of each field, most frequent first.
    """

    means: Mapping[str, Vector]
    scales: Mapping[str, Vector]
    labels: Mapping[str, Sequence[str]]

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
        """(P, L) 1 for each label that a prompt has; an unknown label has none."""
        parts = [
            np.array([[given == label for given in prompts.fields[name]] for label in labels], dtype=np.float64)
            for name, labels in self.labels.items()
            if labels
        ]
        return np.vstack([np.zeros((0, len(prompts))), *parts]).T

    def state(self) -> tuple[Arrays, Values]:
        """Means and scales; labels."""
        arrays = {f"mean.{name}": mean for name, mean in self.means.items()}
        return arrays | {f"scale.{name}": scale for name, scale in self.scales.items()}, {"labels": dict(self.labels)}


def fit(prompts: Prompts) -> Design:
    """Measure the states, and list the labels."""
    means = {name: states.mean(axis=0, dtype=np.float64) for name, states in prompts.states.items()}
    return Design(
        means,
        {name: _scale(states, means[name]) for name, states in prompts.states.items()},
        {name: known_labels(labels) for name, labels in prompts.fields.items()},
    )


def restore(arrays: Arrays, values: Values) -> Design:
    """From a state."""
    parts: dict[str, dict[str, Vector]] = {"mean": {}, "scale": {}}
    for name, array in arrays.items():
        part, _, encoder = name.partition(".")
        if part in parts and encoder:
            parts[part][encoder] = np.asarray(array)
    return Design(parts["mean"], parts["scale"], values["labels"])


def known_labels(labels: Sequence[str | None]) -> list[str]:
    """The labels that occur, most frequent first, then by name."""
    counts = Counter(label for label in labels if label is not None)
    return sorted(counts, key=lambda label: (-counts[label], label))


def unit(rows: Matrix) -> Matrix:
    """Rows of length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0))


def _scale(states: Matrix, mean: Vector) -> Vector:
    deviation = states.std(axis=0, dtype=np.float64)
    varies = deviation > _RESOLUTION * np.abs(mean)
    return np.where(varies, deviation, 1.0) * math.sqrt(states.shape[1])
