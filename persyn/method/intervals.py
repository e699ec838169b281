"""Intervals of means, by the percentile bootstrap, and of the difference of two means. Pure NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Vector = NDArray[np.float64]

#: Number of bootstrap resamples, and the coverage of an interval.
DRAWS, LEVEL = 2_000, 0.95
#: The normal quantile of that coverage.
_NORMAL = 1.959964
#: Weights held in memory at once.
_HELD = 2_000_000


class Interval(Struct, frozen=True):
    """A mean, or a difference of means, and its 95% interval."""

    mean: float
    low: float
    high: float


class Sample(Struct, frozen=True):
    """The mean of n values, and their variance with n - 1 degrees of freedom; NaN if n is 1."""

    mean: float
    variance: float
    n: int


def sample(values: Vector) -> Sample | None:
    """The mean and the variance of some values; None if there are none."""
    if not len(values):
        return None
    return Sample(float(values.mean()), float(values.var(ddof=1)) if len(values) > 1 else np.nan, len(values))


def difference(one: Sample, other: Sample) -> Interval:
    """How far the mean of one sample is above that of an independent one, with a normal interval.

    Its standard error is Welch's (1938), which assumes no equal variances.
    """
    error = np.sqrt(one.variance / one.n + other.variance / other.n)
    mean = one.mean - other.mean
    return Interval(mean, float(mean - _NORMAL * error), float(mean + _NORMAL * error))


def interval(mean: float, drawn: Vector) -> Interval:
    """Percentile interval of the resampled means; NaN, the mean of an empty resample, is ignored."""
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def weights(n: int, *, seed: int) -> Iterator[Vector]:
    """Yield the bootstrap weights as (D, n) pieces, `DRAWS` rows in all.

    A row counts how often each of the n items occurs in one resample of size n with replacement.
    The same seed gives the same weights; memory does not grow with n.
    """
    chance = np.random.default_rng(seed)
    at_once = max(1, min(DRAWS, _HELD // n))
    for first in range(0, DRAWS, at_once):
        drawn = chance.multinomial(n, np.full(n, 1.0 / n), size=min(at_once, DRAWS - first))
        yield drawn.astype(np.float64)
