"""Draws that sample every part of a run at the same rate, calculated by hand."""

from __future__ import annotations

import numpy as np

from persyn.method import draws

#: Prompts that were not asked yet: 48 of the first part, of which 12 were asked, and all 20 of the second.
PARTS = np.array([0, 1] * 20 + [0] * 28)
ASKED, LEFT = np.array([12, 0]), np.array([48, 20])


def test_a_part_that_was_not_sampled_is_drawn_until_its_rate_is_that_of_the_other() -> None:
    drawn = draws.even(PARTS, ASKED, LEFT, 8)

    assert drawn[:4].tolist() == [1, 3, 5, 7]  # its first ones: 4 of 20 are 12 of 60
    assert PARTS[drawn[4:]].tolist() == [0, 1, 0, 0]  # 13 and 15 of 60 are 4.3 and 5 of 20
    assert len(set(drawn.tolist())) == 8


def test_no_more_are_drawn_than_there_are() -> None:
    assert sorted(draws.even(np.array([0, 0, 1]), np.array([0, 0]), np.array([2, 1]), 9).tolist()) == [0, 1, 2]


def test_a_run_without_extensions_is_drawn_in_the_order_given() -> None:
    assert draws.even(np.zeros(5, dtype=np.intp), np.array([5]), np.array([5]), 3).tolist() == [0, 1, 2]
