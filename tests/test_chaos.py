"""Run one short round of `make chaos`."""

from __future__ import annotations

import pytest

from tests import chaos


@pytest.mark.parametrize("seed", [1])
def test_a_cluster_that_is_hurt_loses_nothing_and_does_nothing_twice(seed: int) -> None:
    outcome = chaos.round_of(seed, prompts=400)

    assert sum(outcome.faults.values()) > 2
    assert (outcome.lost, outcome.duplicate, outcome.problems) == (0, 0, []), str(outcome)
