"""Assign the remaining prompts within the limits of [strategy]: all of them at once, for the highest expected reward.

Scores and rewards are in temporary files, so that memory does not grow with prompts times teachers. All is one
transaction: killed at any moment, it leaves nothing, and the same inputs lead to the same assignment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from msgspec.structs import replace
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from persyn.config import StrategyTable, load_config
from persyn.db import bulk, grid, lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, Teacher
from persyn.db.grid import Grid
from persyn.db.results import Assignment, Router, RouterScore
from persyn.errors import UsageError
from persyn.method import assignment, expectation, limits
from persyn.method.assignment import Infeasible, Solution
from persyn.method.expectation import Expectation
from persyn.method.intervals import Vector
from persyn.method.limits import Costs, Limits
from persyn.method.rewards import Indices, Matrix
from persyn.stages import answers, outcomes, unassigned, verdict
from persyn.stages.batch import CHARACTERS, TOKENS_PER_CHARACTER, seed_of
from persyn.stages.outcomes import Outcome, TeacherLimits

#: Prompts read and written at once.
_CHUNK = 10_000
#: A cost may exceed a budget by this part of it.
_ROUNDING = 1e-9

_TIGHT = (
    "calibration prompts that get no reward are assigned with the others, and the limits of [strategy] may be too "
    "tight for that; if none got one, {why}"
)

DOLLARS, TOKENS = "US dollars", "1,000 response tokens"


def require(session: Session, run: Run) -> list[str]:
    """Raise `UsageError` for limits that no calibration can make possible; return what may make them impossible.

    The run's prompts must be there. Those of the grid that get no reward are assigned with the others.
    """
    strategy = load_config(run.config).strategy
    if not strategy.is_limited:
        return []
    teachers = lookup.teachers(session, run.id)
    if strategy.budget is not None or strategy.cost_weight is not None:
        unit_of(teachers)
    of_run = select(func.count()).where(RunPrompt.run_id == run.id)
    n_all, n_prompts = session.scalars(of_run).one(), session.scalars(of_run.where(RunPrompt.role == Role.TARGET)).one()
    names = [teacher.name for teacher in teachers]
    if why := limits.conflict(n_prompts, limits_of(strategy, names, n_prompts), names):
        raise UsageError(f"the limits of [strategy] cannot be kept together: {why}")
    why = limits.conflict(n_all, limits_of(strategy, names, n_all), names)
    return [_TIGHT.format(why=why)] if why else []


def unit_of(teachers: Sequence[Teacher]) -> str:
    """The unit of costs; raise `UsageError` if only some teachers have prices."""
    without = [each.name for each in teachers if each.price_in is None or each.price_out is None]
    if 0 < len(without) < len(teachers):
        raise UsageError(
            f"[strategy] cost_weight and budget compare costs, and {', '.join(without)} has no price_in and price_out; "
            "give both to every teacher, or to none: then costs are response tokens"
        )
    return TOKENS if without else DOLLARS


def limits_of(strategy: StrategyTable, teachers: Sequence[str], n_prompts: int) -> Limits:
    """The limits for a number of prompts; a share is rounded so that it is kept."""
    least = [np.ceil((share or 0.0) * n_prompts - 1e-9) for share in strategy.shares("min_share", teachers)]
    most = [
        n_prompts if share is None else np.floor(share * n_prompts + 1e-9)
        for share in strategy.shares("max_share", teachers)
    ]
    room = [(strategy.capacity or {}).get(name, n_prompts) for name in teachers]
    return Limits(
        np.array(least, dtype=np.int64),
        np.minimum(most, room).astype(np.int64),
        np.inf if strategy.budget is None else strategy.budget,
        strategy.cost_weight or 0.0,
    )


def assign(session: Session, run: Run, against: verdict.Decision | None, expected: Expectation) -> None:
    """Assign all remaining prompts, and record what the limits are worth.

    against: see `verdict_against`.
    Raises `UsageError` when the limits cannot be kept, and when costs are not known.
    """
    with _remaining(session, run, expected) as found:
        if found is None:
            return
        solved, free = _solve(found), found.free()
        found.write(solved, free.choice, _reason(session, run, against, expected))
        made = _outcome(found, solved, free, expected)
        outcomes.record(session, run, replace(made, by_verdict=against is not None))


def require_room(session: Session, run: Run) -> None:
    """Raise `UsageError` if the limits cannot be kept with the remaining prompts, before these are routed."""
    if not load_config(run.config).strategy.is_limited:
        return
    against = verdict_against(session, run, verdict.decision(session, run))
    means = replace(expect(session, run, against), slope=0.0)
    with _remaining(session, run, means) as found:
        if found is not None:
            _solve(found)


@contextmanager
def _remaining(session: Session, run: Run, expected: Expectation) -> Iterator[_Table | None]:
    """The remaining prompts with what is expected of each teacher; None if there are none."""
    count = select(func.count()).select_from(unassigned.missing(run.id).subquery())
    if not (n_prompts := session.scalars(count).one()):
        yield None
        return
    with _arrays(n_prompts, len(expected.levels)) as arrays:
        found = _Table(session, run, grid.read(session, run), arrays)
        found.read(expected)
        yield found


def _solve(found: _Table) -> Solution:
    """Solve for all prompts; raise `UsageError` when the limits cannot be kept."""
    try:
        return assignment.solve(found.rewards, found.costs, found.limits)
    except Infeasible:
        pass
    raise UsageError(
        f"the limits of [strategy] cannot be kept together: {_why(found)}. To use others, start a run under another "
        "name; it shares all responses and scores"
    )


def _why(found: _Table) -> str:
    """Which limits conflict."""
    names = [teacher.name for teacher in found.teachers]
    if conflict := limits.conflict(len(found.rewards), found.limits, names):
        return conflict
    least = assignment.cheapest(found.rewards, found.costs, found.limits)
    if least is None:
        return "capacity, min_share and max_share leave no assignment to teachers that have responses"
    if least > found.limits.budget:
        return f"the least possible cost is {least:,.6g} ({found.unit}), and the budget {found.limits.budget:,.6g}"
    return "no assignment was found"


def _reason(session: Session, run: Run, against: verdict.Decision | None, expected: Expectation) -> str:
    """What decides between teachers that have room and are not too dear."""
    if expected.slope:
        return f"router: {session.get_one(Router, run.router_id).kind}"
    return "means: the router is of no measured use" if against is None else against.reason


def verdict_against(session: Session, run: Run, decided: verdict.Decision | None) -> verdict.Decision | None:
    """The decision on the run's verdict, if it is that the router's scores do not count; otherwise None.

    A decision not to route is for the best single teacher, so it holds only if that one may answer all remaining
    prompts. With `cost_weight`, the expected rewards decide how much of it is worth its cost.
    """
    if decided is None or decided.routes:
        return None
    remaining = unassigned.missing(run.id).join(Prompt, Prompt.id == RunPrompt.prompt_id)
    measures = func.count(), func.coalesce(func.sum(CHARACTERS), 0)
    n_prompts, n_characters = session.execute(remaining.with_only_columns(*measures)).one()
    if not n_prompts:
        return decided
    teachers = lookup.teachers(session, run.id)
    column = [teacher.id for teacher in teachers].index(decided.ranking[0])
    costs = costs_of(session, run, grid.read(session, run), np.array([float(n_characters)]))
    left = _left(session, run, teachers, costs, n_prompts)
    is_alone = left.most[column] >= n_prompts and not np.delete(left.least, column).any() and not left.cost_weight
    cost = n_prompts * costs.fixed[column] + n_characters * costs.rate[column]
    return decided if is_alone and cost <= left.budget * (1 + _ROUNDING) else None


def expect(session: Session, run: Run, against: verdict.Decision | None) -> Expectation:
    """What to expect of each teacher by the calibration prompts; raise `UsageError` where one has no reward.

    Scores count as far as they have predicted rewards of prompts that the router had not seen.

    against: see `verdict_against`.
    """
    cells = grid.read(session, run)
    scores = np.full(cells.quality.shape, np.nan)
    if against is None:
        with suppress(UsageError):
            scores = verdict.unseen_scores(session, run, cells)
    try:
        return expectation.of_scores(scores, cells.rewards())
    except ValueError as error:
        raise UsageError(f"the limits of [strategy] need rewards: {error}") from error


def costs_of(session: Session, run: Run, cells: Grid, sizes: Vector) -> Costs:
    """Expected costs of answers to prompts of some lengths, from the grid's token counts.

    A teacher's response has the mean number of tokens of its responses in the grid, and a prompt has tokens in
    proportion to its characters and `answers.opening_characters`. All samples of a prompt count. Costs that are not
    known are 0; raise `UsageError` if a limit is about them.
    """
    config, teachers = load_config(run.config), lookup.teachers(session, run.id)
    is_needed = config.strategy.budget is not None or config.strategy.cost_weight is not None
    lengths = np.array([_mean(column) for column in cells.response_tokens.T])
    uncounted = [teacher.name for teacher, length in zip(teachers, lengths, strict=True) if np.isnan(length)]
    if uncounted and is_needed:
        raise UsageError(
            f"[strategy] cost_weight and budget need token counts, and no calibration response of "
            f"{', '.join(uncounted)} has one"
        )
    nothing, samples = np.zeros(len(teachers)), config.generation.samples
    if uncounted or len({teacher.price_in is None or teacher.price_out is None for teacher in teachers}) > 1:
        return Costs(nothing, nothing, sizes)
    if unit_of(teachers) == TOKENS:
        return Costs(samples * lengths / 1e3, nothing, sizes)
    price_in, price_out = np.array([(teacher.price_in, teacher.price_out) for teacher in teachers]).T / 1e6
    openings = np.array([answers.opening_characters(each.system, each.few_shot) for each in teachers])
    read = _tokens_per_character(session, run, cells, openings) * price_in
    return Costs(samples * (lengths * price_out + openings * read), samples * read, sizes)


def characters(session: Session, run: Run) -> Vector:
    """(P,) lengths of the prompts of a run's grid."""
    found = session.execute(
        select(CHARACTERS)
        .select_from(Prompt)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET)
        .order_by(RunPrompt.prompt_id)
    )
    return np.array([length for (length,) in found], dtype=np.float64)


def _tokens_per_character(session: Session, run: Run, cells: Grid, openings: Vector) -> Vector:
    """(T,) of what each teacher reads; the default where its engine counted no prompt."""
    lengths = characters(session, run)[:, None] + openings
    is_counted = ~np.isnan(cells.prompt_tokens)
    tokens, read = np.nansum(cells.prompt_tokens, axis=0), np.where(is_counted, lengths, 0.0).sum(axis=0)
    return np.asarray(np.divide(tokens, read, out=np.full(len(read), TOKENS_PER_CHARACTER), where=read > 0))


def _mean(values: Vector) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _left(session: Session, run: Run, teachers: Sequence[Teacher], costs: Costs, n_prompts: int) -> Limits:
    """What the limits leave to the remaining prompts."""
    earlier = outcomes.of_run(session, run)
    names, n_all = [each.name for each in teachers], n_prompts + sum(each.prompts for each in earlier)
    counts = np.zeros(len(names), np.int64) + sum(np.array([t.prompts for t in each.teachers]) for each in earlier)
    further, characters = unassigned.given(session, run, teachers, first=2)
    spent = sum(each.cost or 0.0 for each in earlier)
    spent += float((further * costs.fixed + characters * costs.rate).sum())
    whole = limits_of(load_config(run.config).strategy, names, n_all)
    return limits.left(whole, counts + further, spent)


@contextmanager
def _arrays(n_prompts: int, n_teachers: int) -> Iterator[tuple[Matrix, Matrix]]:
    """Two (P, T) arrays in temporary files."""
    with TemporaryFile(prefix="persyn-") as one, TemporaryFile(prefix="persyn-") as other:
        yield tuple(  # type: ignore[misc]
            np.memmap(file, dtype=np.float64, mode="w+", shape=(n_prompts, n_teachers)) for file in (one, other)
        )


class _Table:
    """P remaining prompts, their scores and expected rewards, (P, T) each, and costs."""

    def __init__(self, session: Session, run: Run, cells: Grid, arrays: tuple[Matrix, Matrix]) -> None:
        self.session, self.run, self.cells = session, run, cells
        self.teachers = lookup.teachers(session, run.id)
        self.scores, self.rewards = arrays
        n_prompts = len(self.rewards)
        self.prompt_ids, sizes = np.empty(n_prompts, dtype=np.int64), np.empty(n_prompts)
        self.is_routed = False
        self.costs = costs_of(session, run, cells, sizes)
        self.has_costs = bool(self.costs.fixed.any() or self.costs.rate.any())
        self.unit = unit_of(self.teachers) if self.has_costs else ""
        self.limits = _left(session, run, self.teachers, self.costs, n_prompts)

    def read(self, expected: Expectation) -> None:
        """Read the prompts and, if they count, their scores."""
        self.is_routed, filled = expected.slope > 0, 0
        rewarded = self.cells.rewards()
        spread = float(np.nanmax(rewarded) - np.nanmin(rewarded))
        teacher_ids = [teacher.id for teacher in self.teachers]
        for chunk in _chunks(self.session, self.run):
            rows = slice(filled, filled + len(chunk))
            ids = [prompt.prompt_id for prompt in chunk]
            self.prompt_ids[rows], self.costs.sizes[rows] = ids, [prompt.characters for prompt in chunk]
            if self.is_routed:
                self.scores[rows] = _scores(self.session, self.run, ids, teacher_ids)
            lots = np.array([seed_of(self.run.seed, prompt.content_hash, "limits", 0) / 2**63 for prompt in chunk])
            can = unassigned.present(self.session, teacher_ids, ids)
            rewards = assignment.untie(expected.rewards(self.scores[rows]), lots, spread)
            self.rewards[rows] = np.where(can, rewards, np.nan)
            filled += len(chunk)

    def free(self) -> Solution:
        """The assignment if neither costs nor limits took part."""
        return assignment.solve(self.rewards, self.costs, limits.unlimited(*self.rewards.shape))

    def write(self, solved: Solution, free: Indices, base: str) -> None:
        """Write the assignments; the reason says where costs or limits changed the teacher."""
        choice, price = solved.choice, self.limits.cost_weight + solved.prices.cost
        teacher_ids = np.array([teacher.id for teacher in self.teachers])
        same = {"run_id": self.run.id, "sample": unassigned.first_sample(self.run), "job_id": None}
        for start in range(0, len(choice), _CHUNK):
            rows = slice(start, start + _CHUNK)
            chosen = choice[rows]
            scores, margins = _margins(self.scores[rows] if self.is_routed else None, chosen)
            reasons = [base if is_free else f"limits: {base}" for is_free in (chosen == free[rows]).tolist()]
            # Whether a further teacher has room is seen when it is needed.
            net = self.rewards[rows] - price * self.costs.of(rows)
            further = unassigned.further(self.run, teacher_ids.tolist(), net, chosen.tolist())
            columns = self.prompt_ids[rows].tolist(), teacher_ids[chosen].tolist(), scores, margins, reasons, further
            names = "prompt_id", "teacher_id", "score", "margin", "reason", "further"
            found = [{**same, **dict(zip(names, row, strict=True))} for row in zip(*columns, strict=True)]
            bulk.insert_new(self.session, Assignment, found)


def _chunks(session: Session, run: Run) -> Iterator[Sequence[Any]]:
    """Yield the remaining prompts with lengths and hashes, in order of ids."""
    missing = unassigned.missing(run.id).join(Prompt, Prompt.id == RunPrompt.prompt_id)
    missing = missing.add_columns(Prompt.content_hash, CHARACTERS.label("characters"))
    missing = missing.order_by(RunPrompt.prompt_id).limit(_CHUNK)
    last = 0
    while chunk := session.execute(missing.where(RunPrompt.prompt_id > last)).all():
        last = chunk[-1].prompt_id
        yield chunk


def _scores(session: Session, run: Run, prompt_ids: Sequence[int], teacher_ids: Sequence[int]) -> Matrix:
    """(P, T) scores of the run's router for P successive remaining prompts; raise `UsageError` where one is missing."""
    of_router = and_(RouterScore.router_id == run.router_id, RouterScore.prompt_id == RunPrompt.prompt_id)
    rows = session.connection().execute(
        unassigned.missing(run.id)
        .join(RouterScore, of_router)
        .with_only_columns(RouterScore.score)
        .where(RunPrompt.prompt_id.between(prompt_ids[0], prompt_ids[-1]))
        .order_by(RouterScore.prompt_id, RouterScore.teacher_id)
    )
    # Of millions of numbers, SQLAlchemy's rows would take as long to make as the database takes to read them.
    found = np.fromiter(chain.from_iterable(rows.cursor.fetchall()), dtype=np.float64)
    if len(found) != len(prompt_ids) * len(teacher_ids):
        raise UsageError(f"run {run.name!r} lacks router scores of prompts that it has to assign")
    head_order = np.argsort(np.argsort(teacher_ids))
    return found.reshape(len(prompt_ids), len(teacher_ids))[:, head_order]


def _margins(scores: Matrix | None, chosen: Indices) -> tuple[list[float | None], list[float | None]]:
    """The chosen teachers' scores, and how far they are above the highest other ones: below 0 where one is higher."""
    if scores is None:
        return [None] * len(chosen), [None] * len(chosen)
    places = np.arange(len(chosen)), chosen
    others = np.array(scores)
    own = others[places]
    others[places] = -np.inf
    return own.tolist(), (own - others.max(axis=1)).tolist()


def _outcome(found: _Table, solved: Solution, free: Solution, expected: Expectation) -> Outcome:
    kept = found.limits
    columns = solved.counts.tolist(), kept.least.tolist(), kept.most.tolist(), solved.prices.teachers.tolist()
    ids = [teacher.id for teacher in found.teachers]
    return Outcome(
        prompts=len(solved.choice),
        unit=found.unit,
        cost=solved.cost if found.has_costs else None,
        budget=kept.budget if np.isfinite(kept.budget) else None,
        cost_weight=kept.cost_weight,
        reward=solved.value + kept.cost_weight * solved.cost,
        value=solved.value,
        bound=solved.bound,
        free_reward=free.value,
        free_cost=free.cost if found.has_costs else None,
        moved=int((solved.choice != free.choice).sum()),
        price=solved.prices.cost,
        teachers=[TeacherLimits(*row) for row in zip(ids, *columns, strict=True)],
        slope=expected.slope,
        fitted=expected.fitted,
        error=expected.error,
    )
