"""The control chart of a teacher's quality, worked by hand, and its errors over whole runs, simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from persyn.method import control_chart
from persyn.method.control_chart import LIMIT, Design, Point
from persyn.method.intervals import Vector


def right(count: int, n: int) -> Vector:
    """Qualities of which so many are 1, and the others 0."""
    return np.arange(n) < count


def test_the_reference_is_the_lower_end_of_agresti_and_coulls_interval() -> None:
    found = control_chart.design(np.array(right(40, 50), dtype=float), low=0.0, high=1.0)

    assert found is not None
    z = 1.959964
    mean = (40 + z**2 / 2) / (50 + z**2)  # 0.7786
    error = math.sqrt(mean * (1 - mean) / (50 + z**2))  # 0.0566
    assert (found.predicted, found.n) == (0.8, 50)
    assert found.reference == pytest.approx(mean - z * error)
    assert found.reference == pytest.approx(0.6676, abs=1e-4)
    assert found.weight == pytest.approx(1 / 3 / math.sqrt(mean * (1 - mean)))


def test_few_equal_responses_are_not_certain() -> None:
    found = control_chart.design(np.ones(4), low=0.0, high=1.0)
    assert found is not None
    assert found.reference < 0.6


@pytest.mark.parametrize(("qualities", "high"), [([], 1.0), ([2.0, 2.0], 0.0)])
def test_without_a_prediction_there_is_no_chart(qualities: list[float], high: float) -> None:
    assert control_chart.design(np.array(qualities), low=0.0, high=high) is None


def test_zeros_and_ones_have_bernoullis_likelihood_ratio() -> None:
    # 0.8 against 0.6: a right response multiplies the ratio by 0.6 / 0.8, a wrong one by 0.4 / 0.2.
    chart = Design(0.8, 100, 0.0, 1.0, reference=0.8, weight=0.2 / (0.8 * 0.2))

    found = control_chart.add(chart, Point(), np.array([0.0, 0.0, 1.0]))

    assert found.statistic == pytest.approx(2 * math.log(2) + math.log(0.75))
    assert (found.responses, found.rising, found.total) == (3, 3, 1.0)
    assert found.mean == pytest.approx(1 / 3)
    assert control_chart.add(chart, found, np.ones(4)) == Point(responses=7)  # 1.0986 - 4 x 0.2877 < 0


def test_another_unit_changes_nothing_and_what_is_beyond_the_range_counts_as_its_end() -> None:
    plain = Design(0.8, 100, 0.0, 1.0, reference=0.8, weight=1.0)
    logits = Design(6.0, 100, -10.0, 10.0, reference=0.8, weight=1.0)
    assert logits.expected == 6.0

    one = control_chart.add(plain, Point(), np.array([0.0, 0.1, 1.0]))
    other = control_chart.add(logits, Point(), np.array([-90.0, -8.0, 90.0]))

    assert other.statistic == pytest.approx(one.statistic)
    assert other.total == -8.0


def test_a_single_job_proves_nothing() -> None:
    chart = Design(0.8, 100, 0.0, 1.0, reference=0.7, weight=0.8)
    point, points = Point(), []
    while not point.is_alarm:
        points.append(point := control_chart.add(chart, point, np.zeros(1000)))
    assert [each.statistic for each in points] == pytest.approx([LIMIT / 5 * n for n in range(1, 6)])
    assert pytest.approx(math.log(2e6)) == LIMIT


def simulated(chances: list[float], *, calibration: int, size: int, runs: int) -> Vector:
    """The job at which each run's chart raises the alarm; infinite if none does.

    chances: that a response of each job is right; the first one is also that of a calibration response.
    """
    chance = np.random.default_rng(0)
    found = np.full(runs, np.inf)
    for run in range(runs):
        known = np.array(right(chance.binomial(calibration, chances[0]), calibration), dtype=float)
        chart, point = control_chart.design(known, low=0.0, high=1.0), Point()
        assert chart is not None
        for job, count in enumerate(chance.binomial(size, chances), 1):
            point = control_chart.add(chart, point, np.array(right(count, size), dtype=float))
            if point.is_alarm:
                found[run] = job
                break
    return found


@pytest.mark.parametrize("calibration", [10, 50, 200])
def test_a_teacher_as_good_as_predicted_is_not_stopped(calibration: int) -> None:
    stopped = np.isfinite(simulated([0.8] * 100, calibration=calibration, size=40, runs=200))
    assert stopped.sum() <= 1  # measured: under 0.3% of runs


def test_a_teacher_that_falls_from_080_to_050_is_stopped_within_a_few_jobs() -> None:
    jobs = simulated([0.8] * 10 + [0.5] * 90, calibration=200, size=40, runs=100)
    assert jobs.min() > 10
    assert np.median(jobs) <= 10 + 7
    assert np.isfinite(jobs).all()


def test_prompts_in_the_order_of_their_topics_raise_no_alarm() -> None:
    # Right on 0.9 of the first half of the prompts and on 0.4 of the others: jobs alternate between the halves.
    at = np.arange(100) * 2_654_435_769 % 2**32 / 2**32
    chance = np.random.default_rng(0)
    for _ in range(50):
        known = chance.random(400) < np.where(chance.random(400) < 0.5, 0.9, 0.4)
        chart, point = control_chart.design(known.astype(float), low=0.0, high=1.0), Point()
        assert chart is not None
        for share in np.where(at < 0.5, 0.9, 0.4):
            point = control_chart.add(chart, point, (chance.random(64) < share).astype(float))
            assert not point.is_alarm
