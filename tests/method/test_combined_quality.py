"""The quality of several scorers: sums, gates, and what a missing value decides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from persyn.method.combined_quality import combine

#: A gate has no weight.
GATE = None


@pytest.mark.parametrize(
    ("weights", "values", "quality"),
    [
        ((0.5, 0.1), (1, -3), 0.2),  # 0.5 * 1 + 0.1 * -3
        ((2, -1), (0.5, 3), -2),
        ((GATE, 0.1), (0, 40), 0),
        ((GATE, 0.1), (1, 0), 1.5),  # 1 + 1 / (1 + e^0)
        ((GATE, 0.1), (1, 10 * math.log(3)), 1.75),  # 1 + 1 / (1 + 1/3)
        ((GATE, 0.1), (1, -10 * math.log(3)), 1.25),
        ((GATE, 0.5, 1), (1, 4, -2), 1.5),
        ((0.1, GATE), (10 * math.log(3), 1), 1.75),
        ((GATE, GATE), (1, 1), 1),
        ((GATE, GATE), (1, 0.99), 0),
        ((GATE, 1), (1, 1e6), 2),
        ((GATE, 1), (1, -1e6), 1),
    ],
)
def test_values_are_summed_by_weight_behind_the_gates(
    weights: Sequence[float | None], values: Sequence[float], quality: float
) -> None:
    assert combine(weights, values) == pytest.approx(quality, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "values", "quality"),
    [
        ((0.5, 0.1), (1, None), None),
        ((GATE, 0.1), (None, 3), None),
        ((GATE, 0.1), (1, None), None),
        ((GATE, GATE), (1, None), None),
        ((GATE, GATE), (None, 0), 0),  # whatever the other one is
        ((GATE, 0.1), (0, None), 0),
    ],
)
def test_a_missing_value_counts_unless_a_gate_has_decided(
    weights: Sequence[float | None], values: Sequence[float | None], quality: float | None
) -> None:
    assert combine(weights, values) == quality


def test_every_right_response_is_above_every_wrong_one_and_keeps_its_order() -> None:
    logits = [-30.0, -2.0, 0.0, 0.5, 12.0, 30.0]
    right = [combine((GATE, 1.0), (1, logit)) for logit in logits]
    assert right == sorted(set(right))
    assert min(right) >= 1 > 0 == combine((GATE, 1.0), (0, max(logits)))


def test_a_sum_beyond_all_numbers_is_not_finite() -> None:
    assert combine((1, 1), (1e308, 1e308)) == math.inf
    assert math.isnan(combine((GATE, 1e300, 1e300), (1, 1e300, -1e300)) or 0)
