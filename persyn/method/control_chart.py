"""A control chart of a teacher's quality: are its responses worse than its calibration responses predicted?

A one-sided CUSUM (Page 1954) of the log of a likelihood ratio, job by job. It holds "as good as predicted" against "a
third of a standard deviation worse". For qualities of 0 and 1 the ratio is that of two Bernoulli distributions; for any
other quality within [0, 1] it is still a bet whose expected gain is not positive while the mean is as predicted
(Waudby-Smith and Ramdas 2024), so nothing else need be known of its distribution. Pure Python and NumPy.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Vector = NDArray[np.float64]

#: The probability that a teacher whose mean quality is at the reference, or above, ever raises the alarm in a run.
_FALSE_ALARM = 0.005
#: Jobs that a teacher has at most in a run; the statistic can begin to rise at each of them.
_MOST_JOBS = 10_000
#: Where the chart raises the alarm, in nats. A ratio that starts at one job ever reaches it with a probability of at
#: most _FALSE_ALARM / _MOST_JOBS (Ville 1939), whatever the number of responses.
LIMIT = math.log(_MOST_JOBS / _FALSE_ALARM)
#: What one job can add. The prompts of a job may be alike, and unlike the rest: fewer than five jobs prove nothing.
_MOST_GAIN = LIMIT / 5
#: The drop below the reference for which the ratio is best, in standard deviations.
_DROP = 1 / 3
#: The normal quantile of the interval of a prediction, whose lower end is the reference.
_NORMAL = 1.959964


class Design(Struct, frozen=True):
    """What a teacher's responses are held against, fixed before the first of them.

    predicted: mean quality of the calibration responses, in the quality's unit, and their number.
    low, high: the range of qualities that [0, 1] stands for; those beyond count as its ends.
    reference: the lower end of the prediction's 95% interval, within [0, 1].
    weight:    how much a response counts; the bet on it is weight x (reference - quality).
    """

    predicted: float
    n: int
    low: float
    high: float
    reference: float
    weight: float

    @property
    def expected(self) -> float:
        """The reference in the quality's unit."""
        return self.low + self.reference * (self.high - self.low)


class Point(Struct, frozen=True):
    """The chart after a job; the statistic has been rising, without falling back to 0, for `rising` responses.

    responses: those on the chart.
    statistic: nats, from 0; LIMIT is the alarm.
    total:     sum of the qualities of the responses since it has been rising, in the quality's unit.
    """

    responses: int = 0
    statistic: float = 0.0
    rising: int = 0
    total: float = 0.0

    @property
    def is_alarm(self) -> bool:
        """Whether the teacher is worse than predicted."""
        return self.statistic >= LIMIT

    @property
    def mean(self) -> float | None:
        """The mean quality of the responses since the statistic has been rising; None while it is 0."""
        return self.total / self.rising if self.rising else None


def design(qualities: Vector, *, low: float, high: float) -> Design | None:
    """Design a chart from the qualities of a teacher's calibration responses; None if there are none to go by.

    qualities: (P,) in the quality's unit.
    low, high: the lowest and the highest quality of any teacher.

    The interval is that of Agresti and Coull (1998), as if _NORMAL**2 / 2 more responses were at each end of the range.
    With their variance it serves other qualities too, and few equal ones do not look certain.
    """
    if not len(qualities) or high <= low:
        return None
    x, more = (qualities - low) / (high - low), _NORMAL**2 / 2
    n = len(x) + 2 * more
    mean = (x.sum() + more) / n
    variance = (((x - mean) ** 2).sum() + more * (mean**2 + (1 - mean) ** 2)) / n
    reference = float(max(mean - _NORMAL * math.sqrt(variance / n), 0.0))
    # Beyond half of what a certain loss would allow, one good response could undo any number of bad ones.
    weight = float(min(_DROP / math.sqrt(variance), 0.5 / (1 - reference)))
    return Design(float(qualities.mean()), len(x), low, high, reference, weight)


def add(chart: Design, was: Point, qualities: Vector) -> Point:
    """Add the qualities of a job's responses: (N,) in the quality's unit."""
    x = np.clip((qualities - chart.low) / (chart.high - chart.low), 0.0, 1.0)
    gain = min(float(np.log1p(chart.weight * (chart.reference - x)).sum()), _MOST_GAIN)
    responses, statistic = was.responses + len(x), was.statistic + gain
    if statistic <= 0:
        return Point(responses)
    return Point(responses, statistic, was.rising + len(x), was.total + float(qualities.sum()))
