"""Finding the request that kills the engine."""

from __future__ import annotations

from persyn.workers.runner.poison_isolation import PoisonIsolation


def test_the_first_death_narrows_nothing() -> None:
    suspicion = PoisonIsolation()
    assert suspicion.died([(1, n) for n in range(64)]) is None
    assert suspicion.limit(64) == 64


def test_each_further_death_leaves_a_quarter_until_one_is_alone() -> None:
    suspicion = PoisonIsolation()
    limits = []
    flying = 64
    while (guilty := suspicion.died([(1, n) for n in range(flying)])) is None:
        flying = suspicion.limit(64)
        limits.append(flying)
    assert limits == [64, 16, 4, 1]
    assert guilty == (1, 0)


def test_a_request_alone_at_the_first_death_is_tried_again() -> None:
    suspicion = PoisonIsolation()
    assert suspicion.died([(1, 7)]) is None
    assert suspicion.died([(1, 7)]) == (1, 7)


def test_the_requests_of_a_job_that_is_gone_are_under_no_suspicion() -> None:
    suspicion = PoisonIsolation()
    for _ in range(2):
        suspicion.died([(1, n) for n in range(64)])
    suspicion.forget(1)
    assert suspicion.limit(64) == 64
    assert suspicion.died([(2, 0)]) is None


def test_when_all_suspects_are_cleared_the_window_is_whole_again() -> None:
    suspicion = PoisonIsolation()
    suspicion.died([(1, 1), (1, 2)])
    suspicion.died([(1, 1), (1, 2)])
    assert suspicion.limit(64) == 1
    suspicion.finished((1, 1))
    assert suspicion.limit(64) == 1
    suspicion.finished((1, 2))
    assert suspicion.limit(64) == 64
