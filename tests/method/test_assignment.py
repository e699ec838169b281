"""Assignments within limits are feasible and the best there are, for few prompts and for many."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn.method.assignment import Infeasible, cheapest, solve, untie
from persyn.method.limits import Costs, Limits, conflict, unlimited
from persyn.method.rewards import Matrix


def costs(*of_teachers: float, prompts: int) -> Costs:
    """Costs that do not depend on the prompt."""
    return Costs(np.array(of_teachers), np.zeros(len(of_teachers)), np.zeros(prompts))


def test_a_full_teacher_answers_where_it_is_ahead_most() -> None:
    values = np.array([[0.9, 0.1], [0.8, 0.5], [0.7, 0.6]])

    found = solve(values, costs(0, 0, prompts=3), Limits(np.array([0, 0]), np.array([1, 3])))

    assert found.choice.tolist() == [0, 1, 1]
    assert found.value == pytest.approx(0.9 + 0.5 + 0.6)
    # Room for a second prompt would bring 0.8 instead of 0.5; for one less, 0.1 instead of 0.9.
    assert 0.3 <= found.prices.teachers[0] <= 0.8
    assert found.bound == pytest.approx(found.value)


def test_a_budget_goes_where_a_unit_of_cost_buys_most() -> None:
    values = np.array([[0.0, 0.3], [0.0, 0.2], [0.0, 0.4]])

    found = solve(values, costs(1, 3, prompts=3), Limits(np.zeros(2), np.full(2, 3), budget=7.0))

    # Two prompts can have the teacher that costs 2 more; a unit of cost then buys half of 0.2.
    assert found.choice.tolist() == [1, 0, 1]
    assert found.cost == pytest.approx(7.0)
    assert 0.1 <= found.prices.cost <= 0.15


def test_a_cost_weight_is_the_reward_that_a_unit_of_cost_has_to_bring() -> None:
    values = np.array([[0.0, 0.3], [0.0, 0.1]])
    limits = Limits(np.zeros(2), np.full(2, 2), cost_weight=0.1)

    found = solve(values, costs(1, 3, prompts=2), limits)

    assert found.choice.tolist() == [1, 0]
    assert found.value == pytest.approx(0.3 - 0.1 * 4)


def test_a_teacher_answers_only_what_it_can_and_at_least_its_share() -> None:
    values = np.array([[0.9, np.nan], [0.9, 0.1], [0.9, 0.0]])

    found = solve(values, costs(0, 0, prompts=3), Limits(np.array([0, 1]), np.array([3, 3])))

    assert found.choice.tolist() == [0, 1, 0]
    assert found.prices.teachers[1] == pytest.approx(-0.8, abs=0.1001)


def test_limits_that_no_assignment_keeps_are_refused_with_the_reason() -> None:
    values, names = np.ones((4, 2)), ["a", "b"]
    tight = Limits(np.array([0, 3]), np.array([4, 4]), budget=6.0)

    with pytest.raises(Infeasible):
        solve(values, costs(1, 2, prompts=4), tight)

    assert cheapest(values, costs(1, 2, prompts=4), tight) == pytest.approx(1 + 3 * 2)
    assert conflict(4, tight, names) is None
    assert conflict(4, Limits(np.array([0, 0]), np.array([1, 2])), names) == (
        "capacity and max_share leave room for 3 of 4 prompts"
    )
    assert conflict(4, Limits(np.array([3, 2]), np.array([4, 4])), names) == (
        "min_share is for 5 prompts together, and there are 4"
    )
    assert conflict(4, Limits(np.array([3, 0]), np.array([2, 4])), names) == (
        "teacher a has to answer at least 3 of 4 prompts, and at most 2"
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Matrix, Costs, Limits]:
    """Up to 7 prompts and 3 teachers, with ties, gaps and limits that may conflict."""
    n_prompts, n_teachers = draw(st.integers(1, 7)), draw(st.integers(2, 3))
    tenths = st.integers(0, 10).map(lambda number: number / 10)
    values = np.array([[draw(tenths) for _ in range(n_teachers)] for _ in range(n_prompts)])
    values[np.array([[draw(st.integers(0, 4)) == 0 for _ in range(n_teachers)] for _ in range(n_prompts)])] = np.nan
    values[np.isnan(values).all(axis=1)] = 0.5
    priced = Costs(
        np.array([draw(tenths) for _ in range(n_teachers)]),
        np.array([draw(tenths) for _ in range(n_teachers)]),
        np.array([float(draw(st.integers(0, 5))) for _ in range(n_prompts)]),
    )
    least = np.array([draw(st.integers(0, 2)) for _ in range(n_teachers)])
    most = np.array([draw(st.integers(1, n_prompts)) for _ in range(n_teachers)])
    budget = draw(st.one_of(st.just(np.inf), st.integers(0, 100).map(lambda number: number / 10)))
    return values, priced, Limits(least, most, budget, draw(st.sampled_from([0.0, 0.5])))


def is_kept(limits: Limits, counts: Matrix, cost: float) -> bool:
    """Costs may exceed the budget by a solver's tolerance."""
    return bool((counts >= limits.least).all() and (counts <= limits.most).all() and cost <= limits.budget + 1e-5)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_value_is_that_of_the_best_of_all_assignments(problem: tuple[Matrix, Costs, Limits]) -> None:
    values, priced, limits = problem
    n_prompts, n_teachers = values.shape
    best, cells = None, priced.of(slice(None))
    for columns in itertools.product(range(n_teachers), repeat=n_prompts):
        place = np.arange(n_prompts), np.array(columns)
        cost = float(cells[place].sum())
        if is_kept(limits, np.bincount(columns, minlength=n_teachers), cost) and not np.isnan(values[place]).any():
            best = max(best or -np.inf, float(values[place].sum()) - limits.cost_weight * cost)
    if best is None:
        with pytest.raises(Infeasible):
            solve(values, priced, limits)
        return

    found = solve(values, priced, limits)

    assert is_kept(limits, found.counts, found.cost)
    assert found.counts.tolist() == np.bincount(found.choice, minlength=n_teachers).tolist()
    assert found.value == pytest.approx(best, abs=1e-5)
    assert found.bound >= best - 1e-5


@pytest.mark.parametrize("signal", [0.1, 0.0])
def test_many_prompts_are_solved_to_within_a_thousandth_of_the_bound(signal: float) -> None:
    lots = np.random.default_rng(0)
    n_prompts, n_teachers = 6_000, 4
    # Without a signal, only lots and lengths tell prompts apart.
    values = np.linspace(0.4, 0.6, n_teachers) + signal * lots.normal(size=(n_prompts, n_teachers))
    values += 1e-5 * lots.random(values.shape)
    priced = Costs(np.array([1.0, 2, 4, 8]), np.array([0.001, 0.002, 0.004, 0.008]), lots.lognormal(5, 1, n_prompts))
    free = solve(values, priced, unlimited(n_prompts, n_teachers))
    low = cheapest(values, priced, unlimited(n_prompts, n_teachers))
    assert low is not None
    limits = Limits(np.array([0, 0, 900, 0]), np.array([6_000, 1_500, 6_000, 6_000]), low + 0.3 * (free.cost - low))

    found = solve(values, priced, limits)

    assert is_kept(limits, found.counts, found.cost)
    assert found.bound - found.value <= 1e-3 * (free.value - found.value)
    assert (free.choice == values.argmax(axis=1)).all()
    assert found.choice.tolist() == solve(values, priced, limits).choice.tolist()


def test_many_equal_prompts_are_divided_once_they_are_untied() -> None:
    n_prompts = 40_000
    values, priced = np.tile([0.3, 0.5, 0.6], (n_prompts, 1)), costs(0.1, 0.5, 0.9, prompts=n_prompts)
    half = Limits(np.zeros(3, dtype=np.int64), np.full(3, n_prompts // 2))
    within = replace(unlimited(n_prompts, 3), budget=0.3 * n_prompts)
    lots = np.random.default_rng(0).random(n_prompts)

    assert cheapest(values, priced, half) == pytest.approx(20_000 * 0.1 + 20_000 * 0.5)
    assert solve(untie(np.zeros((n_prompts, 3)), lots, 0.0), priced, within).cost == pytest.approx(12_000)
    # From the first teacher to the second, a unit of cost buys 0.2 / 0.4; on to the third, 0.1 / 0.4.
    found = solve(untie(values, lots, 0.3), priced, within)
    assert found.counts.tolist() == [20_000, 20_000, 0]
    assert found.prices.cost == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("dearer", [1.01, 1.05])
@pytest.mark.parametrize("part", [0.1, 0.9])
def test_a_budget_between_two_cheap_teachers_is_kept_beside_an_expensive_one(dearer: float, part: float) -> None:
    # Prices move far from the sample's, measured by the cost of the expensive teacher, which nobody can afford.
    n = 2_000
    values = np.array([0.2, 0.6, 0.7]) + 0.01 * np.random.default_rng(0).normal(size=(n, 3))

    within = replace(unlimited(n, 3), budget=n * (1.0 + (dearer - 1.0) * part))

    found = solve(values, costs(1.0, dearer, 10.0, prompts=n), within)

    assert is_kept(within, found.counts, found.cost)
    assert found.counts[1] == pytest.approx(part * n, abs=1)
    assert found.bound - found.value <= 1e-3 * found.value


def test_where_no_prices_are_found_all_prompts_are_solved_together() -> None:
    # Values that lots alone tell apart, a budget and a least number for a teacher that nobody would choose.
    rng, n = np.random.default_rng(4), 1_500
    values = np.array([0.7, 0.2, 0.5]) + 1e-6 * rng.normal(size=(n, 3))
    of_prompts = Costs(np.array([1.0, 1.8, 5.0]), np.array([0.002, 0.004, 0.01]), rng.lognormal(5, 1, n))
    limits = Limits(np.array([0, 140, 0]), np.full(3, n))
    least, most = cheapest(values, of_prompts, limits), solve(values, of_prompts, limits).cost
    assert least is not None

    found = solve(values, of_prompts, replace(limits, budget=least + 0.1 * (most - least)))

    assert found.counts[1] == 140
    assert found.bound - found.value <= 1e-3 * found.value
