"""Assign every prompt to one teacher for the highest total value under limits: of cost, and of prompts per teacher.

Pure NumPy, with SciPy's HiGHS as the solver; independent of where the values come from. Every limit has a price (its
dual, or Lagrange multiplier), and given the prices each prompt is decided alone. Few prompts are one linear program.
Of many, a sample finds approximate prices. These leave undecided the prompts whose two best teachers are about equal;
they, or a sample of them, are solved with prices in a box around the last ones (the Boxstep method of Marsten, Hogan &
Blankenship 1975), until prices hold for all. Linear programs divide a few prompts between teachers; an integer program
decides those. Rows are read a stretch at a time, so that values may be in a memory-mapped file.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from persyn.method.intervals import Vector
from persyn.method.limits import Costs, Counts, Limits, Prices
from persyn.method.quiet import stdout_to_stderr
from persyn.method.rewards import Indices, Matrix

#: Rows read at once; and rows in a linear program, with all columns or with those that a box leaves.
_STRETCH, _WHOLE, _TOGETHER = 16_384, 1_000, 4_000
#: The largest problem, in cells, that is solved as one linear program if no prices were found.
_ALL = 500_000
#: From box to box, the undecided share of rows falls by one factor, or rises by another where the box was too small.
_FALL, _RISE, _WIDEST, _BOXES = 4, 2, 0.5, 40
#: Rows that the integer program decides besides the divided ones, at first and at most; cells with which it may prove
#: that no assignment is better; and nodes of its search, after which the best one found is kept.
_LOOSE, _LOOSEST, _PROOF, _NODES = 24, 20_000, 200, 100
#: When a value is the highest: a part of the largest difference between values, per prompt.
_TOLERANCE = 1e-7
#: What it costs to exceed a limit: in a sample of all rows, in largest differences of values; in a box, in its reach.
_DEAR, _EDGE = 100.0, 0.5
#: A number is whole up to this.
_WHOLLY = 1e-6
#: HiGHS' status of a problem without a solution.
_IMPOSSIBLE = 2
#: Lots, which tell equal rows apart, are up to this part of the largest difference between values.
_LOT = 1e-5
#: Makes of a row's lot one for each column: the fractions of such different multiples of it are all but independent.
_FAR_APART = 10_007


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """An assignment.

    choice: (P,) the column of each prompt's teacher.
    counts: (T,) prompts of each teacher.
    value:  the total value less `cost_weight` times `cost`; that of no assignment within the limits is above `bound`.
    cost:   the total cost.
    """

    choice: Indices
    counts: Counts
    value: float
    cost: float
    bound: float
    prices: Prices


class Infeasible(ValueError):
    """No assignment keeps all limits."""


def solve(values: Matrix, costs: Costs, limits: Limits) -> Solution:
    """The assignment with the highest total value within the limits.

    values: (P, T), NaN where a teacher cannot answer; each row has a number. Of many prompts, rows must not be equal:
            `untie` tells them apart.
    Raises `Infeasible`.
    """
    with suppress(Infeasible):
        return _Problem(values, costs, limits, _WHOLE).solve()
    if not _WHOLE < len(values) <= _ALL / values.shape[1]:
        raise Infeasible
    if np.where(np.isnan(values), np.inf, costs.of(slice(None))).min(axis=1).sum() > limits.budget:
        raise Infeasible
    return _Problem(values, costs, limits, len(values)).solve()  # takes some 15 s for the largest


def untie(values: Matrix, lots: Vector, spread: float) -> Matrix:
    """Values with small additions that tell equal rows apart, since no prices could.

    values: (P, T).
    lots:   (P,) of each row, evenly spread from 0 to 1.
    spread: the largest difference between values; where that is 0, any number does.
    """
    by_column = lots[:, None] * (1 + _FAR_APART * np.arange(values.shape[1]) ** 3) % 1.0
    return np.asarray(values + _LOT * (spread or 1.0) * by_column)


def cheapest(values: Matrix, costs: Costs, limits: Limits) -> float | None:
    """The lowest cost of an assignment that keeps the limits on numbers of prompts; None where none does.

    It may be above the lowest by the lots of `untie`.
    """
    negative, lots = np.empty(values.shape), np.random.default_rng(len(values)).random(len(values))
    spread = float(np.ptp(costs.of(slice(None, None, max(1, len(values) // _WHOLE)))))
    for start in range(0, len(values), _STRETCH):
        rows = slice(start, start + _STRETCH)
        negative[rows] = np.where(np.isnan(values[rows]), np.nan, untie(-costs.of(rows), lots[rows], spread))
    try:
        return solve(negative, costs, replace(limits, budget=np.inf, cost_weight=0.0)).cost
    except Infeasible:
        return None


class _Decided(NamedTuple):
    """Each row's best column at some prices, its lead over the second best, and the sum of the best net values."""

    choice: Indices
    lead: Vector
    total: float


class _Box(NamedTuple):
    """Rows to solve together, each standing for `weight` undecided rows, and prices near those at the centre.

    reach:        how far the best two net values of an undecided row are apart at most.
    counts, cost: of the decided rows.
    """

    rows: Indices
    weight: float
    centre: Prices
    reach: float
    counts: Counts
    cost: float

    @property
    def is_whole(self) -> bool:
        """Whether all columns of the rows are in it."""
        return not np.isfinite(self.reach)


class _Relaxed(NamedTuple):
    """A linear program's solution of a box.

    columns: of each row, the one with its largest part; `is_divided` says which rows have several.
    value:   of the rows, and of what the others have at the centre's prices.
    excess:  whether limits are exceeded, at the price of the edge of the box.
    """

    columns: Indices
    is_divided: NDArray[np.bool_]
    value: float
    excess: bool
    prices: Prices


class _Problem:
    """Values, costs and limits, with what is computed of them once.

    whole: rows that are one linear program with all columns; of more, a sample is.
    """

    def __init__(self, values: Matrix, costs: Costs, limits: Limits, whole: int) -> None:
        self.values, self.costs, self.limits, self.whole = values, costs, limits, whole
        self.n_rows, self.n_columns = values.shape
        some = slice(None, None, max(1, self.n_rows // _WHOLE))
        #: The largest difference between values, about, and what another teacher changes a prompt's cost by, about.
        self.spread = float(np.nanmax(values[some]) - np.nanmin(values[some])) or 1.0
        self.step = float(np.ptp(costs.of(some), axis=1).mean()) or 1.0
        self.limited = np.flatnonzero((limits.least > 0) | (limits.most < self.n_rows))
        self.has_budget = bool(np.isfinite(limits.budget))

    def solve(self) -> Solution:
        """Find prices, box by box, and decide what they leave open by an integer program."""
        lots, prices, share, stretch = np.random.default_rng(self.n_rows), self.no_prices, 1.0, 1.0
        decided, bound = self.decide(prices), np.inf
        if not self.has_budget and not len(self.limited):
            return self._solution(decided.choice, decided.total, prices)
        for _ in range(_BOXES):
            box = self._box(decided, prices, share, lots)
            box = box._replace(reach=box.reach * stretch)
            relaxed = self._linear(box)
            prices, then = relaxed.prices, decided
            decided = self.decide(prices)
            bound = min(bound, self.bound(prices, decided.total))
            is_kept = box.weight == 1.0 and not relaxed.excess
            value = relaxed.value + then.total
            if is_kept and bound - value <= _TOLERANCE * self.spread * self.n_rows:
                choice = then.choice.copy()
                choice[box.rows] = relaxed.columns
                return self._whole(choice, box.rows[relaxed.is_divided], decided, prices, bound)
            is_small = not box.is_whole and (relaxed.excess or is_kept)
            # Where costs hardly differ, prices move far although all rows are undecided.
            stretch = stretch * _RISE if relaxed.excess and share == _WIDEST else 1.0
            share = min(_WIDEST, share * _RISE) if is_small else share / _FALL
        raise Infeasible

    @property
    def no_prices(self) -> Prices:
        """The prices without limits."""
        return Prices(np.zeros(self.n_columns), 0.0)

    def _box(self, decided: _Decided, prices: Prices, share: float, lots: np.random.Generator) -> _Box:
        """The rows that are least decided: a share of all."""
        n_open = min(self.n_rows, max(int(share * self.n_rows), self.whole))
        most, reach, is_open = _TOGETHER, 0.0, np.ones(self.n_rows, dtype=np.bool_)
        if n_open < self.n_rows:
            rows = np.sort(np.argpartition(decided.lead, n_open - 1)[:n_open])
            reach = max(float(decided.lead[rows].max()), _TOLERANCE * self.spread)
            is_open[:] = False
            is_open[rows] = True
        else:
            rows, reach, most = np.arange(self.n_rows), np.inf, self.whole
        weight = max(1.0, n_open / most)
        if n_open > most:
            rows = np.sort(lots.choice(rows, most, replace=False))
        return _Box(rows, weight, prices, reach, *self.totals(decided.choice, np.flatnonzero(~is_open)))

    def net(self, rows: Any, prices: Prices) -> Matrix:
        """(R, T) values less the priced costs and limits; minus infinity where a teacher cannot answer."""
        net = np.asarray(self.values[rows] - prices.teachers)
        if priced := self.limits.cost_weight + prices.cost:
            net -= priced * self.costs.of(rows)
        net[np.isnan(net)] = -np.inf
        return net

    def decide(self, prices: Prices) -> _Decided:
        """Choose for each row alone; ties go to the first column."""
        choice, lead, total = np.empty(self.n_rows, dtype=np.intp), np.empty(self.n_rows), 0.0
        for start in range(0, self.n_rows, _STRETCH):
            rows = slice(start, min(start + _STRETCH, self.n_rows))
            net = self.net(rows, prices)
            place = np.arange(len(net))
            choice[rows] = net.argmax(axis=1)
            best = net[place, choice[rows]]
            net[place, choice[rows]] = -np.inf
            lead[rows] = best - net.max(axis=1)
            total += float(best.sum())
        return _Decided(choice, lead, total)

    def bound(self, prices: Prices, total: float) -> float:
        """The upper bound that prices prove (weak duality), given the sum of the best net values."""
        of_limits = np.where(prices.teachers > 0, self.limits.most, self.limits.least) @ prices.teachers
        return total + float(of_limits) + (prices.cost * self.limits.budget if prices.cost else 0.0)

    def totals(self, choice: Indices, rows: Indices) -> tuple[Counts, float]:
        """Prompts of each teacher, and the cost, of a choice for some rows."""
        counts = np.bincount(choice[rows], minlength=self.n_columns)
        return counts, float(self.costs.of_each(rows, choice[rows]).sum())

    def _linear(self, box: _Box) -> _Relaxed:
        """Solve the relaxed problem of a box.

        Each limit's use is a variable, priced as at the centre; two more exceed it, for the price of the box's edge.
        Only the whole problem has to keep its limits.
        """
        from scipy.optimize import linprog

        net = self.net(box.rows, box.centre)
        best = net.max(axis=1)
        row, column = np.nonzero(np.isfinite(net) & (net >= (best - 2 * box.reach)[:, None]))
        size, edge = (self.spread, _DEAR) if box.is_whole else (box.reach, _EDGE)
        price = np.append(box.centre.teachers[self.limited], [box.centre.cost * self.step] * self.has_budget)
        n_uses, uses = len(price), self._uses(box.rows[row], column)
        low, high = (room / box.weight for room in self._room(box.counts, box.cost))
        may_exceed = np.inf if not box.is_whole or box.weight > 1 else 0.0
        regret = (best[row] - net[row, column]) / size
        found = linprog(
            np.concatenate([regret, -price / size, np.full(2 * n_uses, edge)]),
            A_eq=_matrix(row, len(box.rows), uses, n_uses),
            b_eq=np.append(np.ones(len(box.rows)), np.zeros(n_uses)),
            bounds=[*[(0, 1)] * len(row), *zip(low, high, strict=True), *[(0, may_exceed)] * (2 * n_uses)],
            method="highs-ds",
        )
        if found.status == _IMPOSSIBLE:
            raise Infeasible
        if found.x is None:
            raise RuntimeError(f"HiGHS could not solve an assignment: {found.message}")
        share = found.x[: len(row)]
        first = np.lexsort((column, -share, row))[np.searchsorted(row, np.arange(len(box.rows)))]
        used = np.bincount(column, share, self.n_columns), share @ self.costs.of_each(box.rows[row], column)
        return _Relaxed(
            columns=column[first],
            is_divided=share[first] < 1 - _WHOLLY,
            value=float(
                box.centre.teachers @ (box.counts + used[0])
                + box.centre.cost * (box.cost + used[1])
                - share @ regret * size
            ),
            excess=bool((found.x[len(row) + n_uses :] > _WHOLLY).any()),
            prices=self._prices(price - found.eqlin.marginals[len(box.rows) :] * size),
        )

    def _uses(self, rows: Indices, columns: Indices) -> list[tuple[Indices, Vector]]:
        """What cells use of each limit: (the cells, how much of it)."""
        of_teachers = [np.flatnonzero(columns == k) for k in self.limited]
        uses = [(cells, np.ones(len(cells))) for cells in of_teachers]
        if self.has_budget:
            uses.append((np.arange(len(rows)), self.costs.of_each(rows, columns) / self.step))
        return uses

    def _room(self, counts: Counts, cost: float) -> tuple[Vector, Vector]:
        """What is left of each limit, at least and at most, after some prompts of each teacher and their cost."""
        low = (self.limits.least - counts)[self.limited].astype(np.float64)
        high = (self.limits.most - counts)[self.limited].astype(np.float64)
        if self.has_budget:
            low, high = np.append(low, -np.inf), np.append(high, (self.limits.budget - cost) / self.step)
        return low, high

    def _prices(self, of_uses: Vector) -> Prices:
        """Prices of the limits; a limit that every assignment keeps has none."""
        teachers = np.zeros(self.n_columns)
        teachers[self.limited] = of_uses[: len(self.limited)]
        teachers[(self.limits.least <= 0) & (teachers < 0)] = 0.0
        teachers[(self.limits.most >= self.n_rows) & (teachers > 0)] = 0.0
        return Prices(teachers, max(0.0, float(of_uses[-1]) / self.step) if self.has_budget else 0.0)

    def _whole(self, choice: Indices, divided: Indices, decided: _Decided, prices: Prices, bound: float) -> Solution:
        """Decide the divided rows with a few that are about as undecided; then all that could still raise the value."""
        found = self._solution(self._mended(choice, divided, decided, prices), bound, prices)
        loss = bound - found.value
        worth = np.flatnonzero(decided.lead <= loss)
        if loss > _TOLERANCE * self.spread * self.n_rows and len(worth) * self.n_columns <= _PROOF:
            other = self._integral(found.choice, worth, prices, loss)
            better = found if other is None else self._solution(other, bound, prices)
            found = max(found, better, key=lambda each: each.value)
        return found

    def _mended(self, choice: Indices, divided: Indices, decided: _Decided, prices: Prices) -> Indices:
        """The choice with its divided rows decided, together with as many others as are needed to keep the limits."""
        n_loose, most = _LOOSE, min(_LOOSEST, self.n_rows)
        while len(divided):
            n_loose = min(n_loose, most)
            rows = np.union1d(divided, np.argpartition(decided.lead, n_loose - 1)[:n_loose])
            within = np.inf if n_loose == self.n_rows else 2 * float(decided.lead[rows].max())
            if (found := self._integral(choice, rows, prices, within)) is not None:
                return found
            if n_loose == most:
                raise Infeasible
            n_loose *= 4
        return choice

    def _solution(self, choice: Indices, bound: float, prices: Prices) -> Solution:
        rows = np.arange(self.n_rows)
        counts, cost = self.totals(choice, rows)
        value = sum(
            float(self.values[rows[start : start + _STRETCH], choice[start : start + _STRETCH]].sum())
            for start in range(0, self.n_rows, _STRETCH)
        )
        value -= self.limits.cost_weight * cost
        return Solution(choice, counts, value, cost, max(bound, value), prices)

    def _integral(self, choice: Indices, rows: Indices, prices: Prices, within: float) -> Indices | None:
        """Choose anew for some rows, among cells with a net value so near the best one; None if that is impossible."""
        from scipy.optimize import LinearConstraint, milp

        net, worth = self.net(rows, prices), self.net(rows, self.no_prices)
        row, column = np.nonzero(np.isfinite(net) & (net >= net.max(axis=1, keepdims=True) - within))
        fixed = np.ones(self.n_rows, dtype=np.bool_)
        fixed[rows] = False
        uses = self._uses(rows[row], column)
        low, high = self._room(*self.totals(choice, np.flatnonzero(fixed)))
        matrix = _matrix(row, len(rows), uses, 0)
        once = np.ones(len(rows))
        with stdout_to_stderr():  # HiGHS 1.12 has a line that no option turns off
            found = milp(
                (worth.max(axis=1)[row] - worth[row, column]) / self.spread,
                integrality=np.ones(len(row)),
                bounds=(0, 1),
                constraints=LinearConstraint(matrix, np.append(once, low), np.append(once, high)),
                options={"presolve": False, "mip_rel_gap": 0.0, "node_limit": _NODES},
            )
        if found.x is None:
            return None
        chosen = choice.copy()
        taken = found.x > 0.5
        chosen[rows[row[taken]]] = column[taken]
        return chosen


def _matrix(row: Indices, n_rows: int, uses: list[tuple[Indices, Vector]], n_free: int) -> Any:
    """The constraints of a program: a line for each row and each use; n_free uses have variables of their own, three
    each: its value, what is over it and what is under it."""
    from scipy.sparse import csr_matrix

    lines, places, numbers = [row], [np.arange(len(row))], [np.ones(len(row))]
    for line, (cells, amounts) in enumerate(uses, n_rows):
        lines.append(np.full(len(cells), line))
        places.append(cells)
        numbers.append(amounts)
    own = np.arange(n_free)
    for part, sign in enumerate((-1.0, -1.0, 1.0)):
        lines.append(n_rows + own)
        places.append(len(row) + part * n_free + own)
        numbers.append(np.full(n_free, sign))
    shape = n_rows + len(uses), len(row) + 3 * n_free
    return csr_matrix((np.concatenate(numbers), (np.concatenate(lines), np.concatenate(places))), shape=shape)
