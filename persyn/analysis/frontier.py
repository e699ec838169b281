"""What reward less money buys: the run's router within budgets, measured on the hold-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from msgspec import Struct
from sqlalchemy.orm import Session

from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.grid import Grid
from persyn.errors import UsageError
from persyn.method import assignment, expectation
from persyn.method.assignment import Infeasible
from persyn.method.intervals import Interval, interval, weights
from persyn.method.limits import Costs, unlimited
from persyn.method.rewards import Matrix
from persyn.stages import limits, verdict

#: Budgets, as parts of the way from the cheapest teachers to those that are best whatever they cost.
_PARTS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
#: A budget at an end of that way is exceeded by rounding alone below this part of it.
_ROUNDING = 1e-6


class Point(Struct, frozen=True):
    """Expected rewards made the best of within a budget, and what came of it on the hold-out prompts."""

    #: The budget and the expected cost, per 1,000 prompts in `unit`.
    budget: float
    cost: float
    unit: str
    reward: Interval
    #: Reward per prompt that a unit more per 1,000 prompts would be expected to buy; 0 where none is wanted.
    price: float
    #: Share of the prompts by teacher, without teachers that are never chosen.
    shares: dict[str, float]


def frontier(session: Session, run: Run, cells: Grid) -> list[Point]:
    """The points of the frontier, the most expensive first; empty where a router, rewards or costs are not known.

    What rewards to expect is learned from the calibration prompts alone, as `persyn compare` does.
    """
    rewarded = cells.rewards()
    is_known = ~np.isnan(rewarded).all(axis=1)
    holdout = cells.is_holdout & is_known
    try:
        scores = verdict.unseen_scores(session, run, cells)
        expected = expectation.of_scores(scores[~cells.is_holdout], rewarded[~cells.is_holdout])
        unit = limits.unit_of(lookup.teachers(session, run.id))
    except (UsageError, ValueError):
        return []
    costs = limits.costs_of(session, run, cells, limits.characters(session, run))
    if not costs.fixed.any() or not holdout.any():
        return []
    held = Costs(costs.fixed, costs.rate, costs.sizes[holdout])
    rewards = expected.rewards(np.nan_to_num(scores[holdout]))
    lots = np.random.default_rng(len(rewards)).random(len(rewards))
    values = np.where(np.isnan(rewarded[holdout]), np.nan, assignment.untie(rewards, lots, float(np.ptp(rewards))))
    names = [teacher.name for teacher in lookup.teachers(session, run.id)]
    points = []
    for budget in _budgets(values, held):
        with suppress(Infeasible):  # the other points say something without it
            points.append(_point(values, held, budget, rewarded[holdout], (unit, names)))
    return points


def _budgets(values: Matrix, costs: Costs) -> list[float]:
    none = unlimited(*values.shape)
    most, least = assignment.solve(values, costs, none).cost, assignment.cheapest(values, costs, none)
    assert least is not None  # nothing limits it
    return [least + max(part, _ROUNDING) * max(0.0, most - least) for part in _PARTS]


def _point(values: Matrix, costs: Costs, budget: float, rewarded: Matrix, words: tuple[str, Sequence[str]]) -> Point:
    unit, names = words
    solved = assignment.solve(values, costs, replace(unlimited(*values.shape), budget=budget))
    realised = rewarded[np.arange(len(rewarded)), solved.choice]
    drawn = np.concatenate([each @ realised for each in weights(len(realised), seed=0)]) / len(realised)
    return Point(
        budget=1000 * budget / len(values),
        cost=1000 * solved.cost / len(values),
        unit=unit,
        reward=interval(float(realised.mean()), drawn),
        price=solved.prices.cost / 1000,
        shares={
            names[k]: float(solved.counts[k] / len(values))
            for k in np.argsort(-solved.counts, kind="stable")
            if solved.counts[k]
        },
    )
