"""What a reward costs: PerSyn within budgets beside strategies that do not weigh costs, with model sizes as prices.

    python -m studies.frontier GRID.jsonl.gz ... --teachers teachers.toml --embedding FOLDER --calibration 2250

A grid is one of `studies.router_kinds`, with quality as the reward, or that of a run in a store (`--run NAME`), with
the run's reward; the latter has learnability, which CAR needs. The teachers are described in a file of `[[teachers]]`
with `name` and `params_b`, the price of a response. For each seed, hold-out prompts are drawn, and calibration
prompts from the others. A router is chosen and fitted as `[router] kind = "auto"` does within limits, and rewards are
expected of its scores as far as cross-fitted scores predicted them. The tables go to studies/frontier.md. No row of a
grid is stored in this repository.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sqlalchemy import select

from persyn.config import StrategyTable
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run
from persyn.db.connect import Database
from persyn.db.grid import read as read_cells
from persyn.method import assignment, expectation, strategies
from persyn.method.intervals import Vector
from persyn.method.limits import Costs, unlimited
from persyn.method.rewards import Indices, Matrix
from persyn.router.kinds import choice, crossfit
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS
from studies import router_kinds
from studies.common import error, put, table
from studies.router_kinds import Grid

REPORT = Path(__file__).with_suffix(".md")
#: Budgets, as parts of the way from the cheapest teacher to what is best whatever it costs.
_PARTS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Probabilities of a right answer from which a cascade takes a teacher.
_THRESHOLDS = (0.3, 0.5, 0.7)
#: Shares of the prompts that a mix gives to the largest teacher.
_RATIOS = (0.2, 0.5)


class Point(NamedTuple):
    """What a strategy costs and brings per prompt of the hold-out."""

    cost: float
    reward: float
    #: Of reward over an assignment by the teachers' means within the same budget; NaN for other strategies.
    gain: float = np.nan


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Hold-out prompts of one seed, and what a router expects of the teachers there.

    rewards, expected: (P, T). prices: (T,). neighbours: (P, T) scores. means: (T,) of the calibration rewards.
    car: (T,) compatibility-adjusted rewards; None without learnability.
    """

    rewards: Matrix
    expected: Matrix
    prices: Vector
    neighbours: Matrix
    means: Vector
    car: Vector | None = None

    def of(self, chosen: Indices) -> Point:
        """One teacher for each prompt."""
        return Point(float(self.prices[chosen].mean()), float(self.rewards[np.arange(len(chosen)), chosen].mean()))


def main() -> None:
    """Measure all grids, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", type=Path)
    parser.add_argument("--store", help="URL of a store with runs")
    parser.add_argument("--run", dest="runs", nargs="+", default=[], metavar="NAME", help="runs of the store")
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--embedding", help="folder of a sentence-embedding model")
    parser.add_argument("--backbone", help="folder of a language model whose states are read")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of a prompt that are read")
    parser.add_argument("--field", help="also with the labels in this field of the rows")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEACHER", help="teachers that are left out")
    parser.add_argument("--calibration", type=int, default=2_250)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--home", type=Path, default=Path("build/studies/router_kinds"))
    parser.add_argument("--report", type=Path, default=REPORT, help="the page whose tables are replaced")
    given = parser.parse_args()
    torch.set_num_threads(1)
    listed = tomllib.loads(given.teachers.read_text(encoding="utf-8"))["teachers"]
    sizes = {teacher["name"]: float(teacher["params_b"]) for teacher in listed}
    made = ""
    cases = [Case(router_kinds.read(path, given.field, given.without)) for path in given.grids]
    for case in [*cases, *(of_run(given.store, name) for name in given.runs)]:
        case = replace(case, grid=router_kinds.replace_states(case.grid, given))
        made += report(case, np.array([sizes[name] for name in case.grid.teachers]), given.calibration, given.seeds)
    put(given.report, made)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A grid, and (P, T) quality and learnability where its reward is made of both."""

    grid: Grid
    quality: Matrix | None = None
    learnability: Matrix | None = None


def of_run(url: str, name: str) -> Case:
    """The calibration grid of a run."""
    database = Database(url)
    with database.read() as session:
        run = session.scalars(select(Run).where(Run.name == name)).one()
        cells = read_cells(session, run)
        prompt_ids = cells.prompt_ids.tolist()
        texts = dict(session.execute(select(Prompt.id, Prompt.text).where(Prompt.id.in_(prompt_ids))).all())
        teachers = [teacher.name for teacher in lookup.teachers(session, run.id)]
    database.close()
    prompts = Prompts({}, [texts[prompt_id] for prompt_id in prompt_ids], {})
    return Case(Grid(f"run {name}", prompts, cells.rewards(), teachers), cells.quality, cells.learnability)


def report(case: Case, prices: Vector, calibration: int, seeds: int) -> str:
    """The tables of a grid."""
    grid = case.grid
    complete = np.flatnonzero(~np.isnan(grid.rewards).any(axis=1))
    n_learn = min(calibration, len(complete) * 3 // 4)
    tasks = []
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).permutation(complete)
        tasks.append(_task(case, prices, drawn[:n_learn], drawn[n_learn:], seed))
    frontiers = [frontier(task) for task in tasks]
    others = [dict(rivals(task)) for task in tasks]
    head = f"### {grid.name}\n\n{n_learn:,} calibration prompts, {len(grid.teachers)} teachers, {seeds} seeds.\n\n"
    return head + _frontier_table(frontiers) + _rivals_table(others, frontiers)


def _task(case: Case, prices: Vector, learn: Indices, asked: Indices, seed: int) -> Task:
    grid, car = case.grid, None
    known = grid.rewards[learn]
    if case.quality is not None and case.learnability is not None:
        car = strategies.car(case.quality[learn], case.learnability[learn], beta=StrategyTable().beta)
    bench = crossfit.Bench(grid.prompts.take(learn), Examples(known, seed=seed))
    chosen = choice.choose_on(bench, list(ROUTERS.values()), is_weighed=True)
    prompts = grid.prompts.take(asked)
    expected = expectation.of_scores(chosen.scale * chosen.scores, known)
    return Task(
        rewards=grid.rewards[asked],
        expected=expected.rewards(chosen.scale * chosen.predictor.scores(prompts)),
        prices=prices,
        neighbours=bench.fitted(ROUTERS["neighbours"])[0].scores(prompts),
        means=known.mean(axis=0),
        car=car,
    )


def frontier(task: Task) -> list[Point]:
    """PerSyn within budgets, from the lowest cost to the highest."""
    n_prompts, n_teachers = task.rewards.shape
    costs = Costs(task.prices, np.zeros(n_teachers), np.ones(n_prompts))
    lots = np.random.default_rng(n_prompts).random(len(task.rewards))
    values, by_means = (
        assignment.untie(expected, lots, float(np.ptp(expected)))
        for expected in (task.expected, np.tile(task.means, (n_prompts, 1)))
    )
    none = unlimited(n_prompts, n_teachers)
    least, most = n_prompts * float(task.prices.min()), assignment.solve(values, costs, none).cost
    found = []
    for part in _PARTS:
        within = replace(none, budget=least + part * max(0.0, most - least))
        point = task.of(assignment.solve(values, costs, within).choice)
        shares = assignment.solve(by_means, costs, within).counts / n_prompts  # whose prompts are drawn by lot
        found.append(point._replace(gain=point.reward - float(shares @ task.rewards.mean(axis=0))))
    return found


def rivals(task: Task) -> Iterator[tuple[str, Point]]:
    """The other strategies; costs of those that ask several teachers are of all of them."""
    every = np.arange(len(task.rewards))
    largest, smallest = int(task.prices.argmax()), int(task.prices.argmin())
    for ratio in _RATIOS:
        mixed = [ratio * end for end in task.of(np.full_like(every, largest))]
        rest = [(1 - ratio) * end for end in task.of(np.full_like(every, smallest))]
        yield f"mix, {ratio:.0%} to the largest", Point(mixed[0] + rest[0], mixed[1] + rest[1])
    yield "random", Point(float(task.prices.mean()), float(task.rewards.mean()))
    yield "strong: the largest", task.of(np.full_like(every, largest))
    yield "static: the best on average", task.of(np.full_like(every, int(task.means.argmax())))
    if task.car is not None:
        yield "CAR: the best compatibility-adjusted reward", task.of(np.full_like(every, int(task.car.argmax())))
    yield "nearest neighbours", task.of(strategies.by_ranking(task.neighbours, task.rewards >= 0).argmax(axis=1))
    order = np.argsort(task.prices, kind="stable")
    for threshold in _THRESHOLDS:
        enough = task.expected[:, order] >= threshold
        taken = np.where(enough.any(axis=1), order[enough.argmax(axis=1)], task.expected.argmax(axis=1))
        yield f"cascade: the smallest with an expected reward of {threshold:g}", task.of(taken)
    for n_asked in (2, 3):
        yield f"smallest first, then best on average, until right, {n_asked} at most", _checked(task, n_asked)


def _checked(task: Task, n_asked: int) -> Point:
    """Ask the smallest teacher and then those that are best on average, each only where no answer was right before."""
    best = [int(k) for k in np.argsort(-task.means) if k != task.prices.argmin()]
    found, cost = np.zeros(len(task.rewards)), 0.0
    for k in [int(task.prices.argmin()), *best][:n_asked]:
        cost += float((found < 1).mean() * task.prices[k])
        found = np.where(found < 1, np.maximum(found, task.rewards[:, k]), found)
    return Point(cost, float(found.mean()))


def _frontier_table(frontiers: Sequence[Sequence[Point]]) -> str:
    rows = []
    for part, points in zip(_PARTS, zip(*frontiers, strict=True), strict=True):
        costs, found, gains = (np.array(values) for values in zip(*points, strict=True))
        rows.append((f"{part:.1%}", f"{costs.mean():.1f}", _mean(found), _mean(gains, "{:+.3f}")))
    head = (
        "budget: part of the way from the smallest teacher",
        "cost per prompt",
        "reward (95%)",
        "gain over the means",
    )
    return "PerSyn within budgets, in billions of parameters per response:\n\n" + table(head, rows)


def _rivals_table(others: Sequence[Mapping[str, Point]], frontiers: Sequence[Sequence[Point]]) -> str:
    rows = []
    for name in others[0]:
        points = [each[name] for each in others]
        pairs = list(zip(points, frontiers, strict=True))
        part = np.array([_cost_of(each, point.reward) / point.cost for point, each in pairs])
        more = np.array([_reward_of(each, point.cost) - point.reward for point, each in pairs])
        cost = np.mean([point.cost for point in points])
        reached = "not reached" if np.isnan(part).all() else _mean(part[~np.isnan(part)], "{:.0%}")
        if 0 < np.isnan(part).sum() < len(part):
            reached += f", by {(~np.isnan(part)).sum()} of {len(part)} seeds"
        found = np.array([point.reward for point in points])
        rows.append((name, f"{cost:.1f}", _mean(found), reached, _mean(more, "{:+.3f}")))
    head = (
        "strategy",
        "cost per prompt",
        "reward (95%)",
        "PerSyn's cost for this reward",
        "PerSyn's gain at this cost",
    )
    return "Other strategies, and PerSyn at the same reward and at the same cost:\n\n" + table(head, rows)


def _cost_of(points: Sequence[Point], reward: float) -> float:
    """The lowest cost at which a frontier has a reward, between its points; NaN if it has it nowhere."""
    if points[0].reward >= reward:
        return points[0].cost
    for low, high in pairwise(points):
        if high.reward >= reward:
            return low.cost + (high.cost - low.cost) * (reward - low.reward) / (high.reward - low.reward)
    return np.nan


def _reward_of(points: Sequence[Point], cost: float) -> float:
    """The reward of a frontier at a cost; beyond its ends, that of the end."""
    return float(np.interp(cost, [point.cost for point in points], [point.reward for point in points]))


def _mean(values: Vector, form: str = "{:.3f}") -> str:
    half = error(values)
    interval = " ({} to {})".format(*(form.format(values.mean() + side * half) for side in (-1, 1)))
    return form.format(values.mean()) + (interval if len(values) > 1 else "")


if __name__ == "__main__":
    main()
