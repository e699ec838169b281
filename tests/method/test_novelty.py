"""Which new prompts are far from the calibration prompts, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from persyn.method.novelty import FEWEST, Novelty, compare


def test_far_is_farther_than_all_but_one_in_twenty_of_the_calibration_prompts() -> None:
    known = np.arange(1.0, 40.0)  # 39: a p-value is (1 + those at least as far) / 40, and 2 / 40 is far

    found = compare(known, np.array([38.0, 40.0, 38.5, 5.0]))

    # Of 38.0, two are at least as far: 3 / 40. Of 38.5, one is: 2 / 40.
    assert found.far.tolist() == [1, 2]  # the farthest first
    assert (found.share, found.prompts, found.calibration) == (0.5, 4, 39)


def test_nineteen_calibration_prompts_are_the_fewest_of_which_one_in_twenty_is_known() -> None:
    assert FEWEST == 19
    assert compare(np.arange(19.0), np.array([18.0, 19.0])).far.tolist() == [1]
    with pytest.raises(ValueError, match="18 calibration prompts cannot tell far prompts; 19 can"):
        compare(np.arange(18.0), np.array([1.0]))


@pytest.mark.parametrize(
    ("far", "prompts", "is_much"),
    [
        (1, 1, False),  # as every twentieth prompt of the same kind
        (3, 3, True),  # 100 / 2,000 to the power of 3, about
        (6, 100, False),
        (12, 100, False),  # of chance once in 200 times
        (20, 100, True),
        (8_000, 100_000, False),  # not chance, but few
    ],
)
def test_many_far_prompts_are_more_than_chance_and_more_than_a_tenth(far: int, prompts: int, is_much: bool) -> None:
    assert Novelty(np.arange(far), prompts, 1_999).is_much is is_much


def test_of_prompts_of_the_same_kind_one_pool_in_a_thousand_is_refused_at_most() -> None:
    draw = np.random.default_rng(0)
    refused = sum(compare(draw.normal(size=200), draw.normal(size=50)).is_much for _ in range(2_000))
    assert refused <= 6
