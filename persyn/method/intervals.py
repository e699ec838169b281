"""How sure a mean is: percentile intervals of means over what is drawn anew. Pure NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Vector = NDArray[np.float64]

#: Times that something is drawn anew for an interval, and how much of what comes out it holds.
DRAWS, LEVEL = 2_000, 0.95
#: Numbers drawn at once.
_HELD = 2_000_000


class Interval(Struct, frozen=True):
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(mean: float, drawn: Vector) -> Interval:
    """The percentile interval of what came out of the draws; NaN, a draw of nothing, is left out."""
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def weights(n: int, *, seed: int) -> Iterator[Vector]:
    """(D, n) pieces of `DRAWS` rows in all: how often each of n things is drawn, n times with replacement.

    The same seed gives the same draws; memory does not grow with n.
    """
    chance = np.random.default_rng(seed)
    at_once = max(1, min(DRAWS, _HELD // n))
    for first in range(0, DRAWS, at_once):
        drawn = chance.multinomial(n, np.full(n, 1.0 / n), size=min(at_once, DRAWS - first))
        yield drawn.astype(np.float64)
