"""Compare strategies on the hold-out prompts of a run, using only the responses of the grid.

A strategy learns from the calibration prompts and is measured on unseen hold-out prompts. All figures are expectations
over the strategy's policy, so random choices add no noise; intervals are bootstrapped over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.analysis.frontier import Point, frontier
from persyn.config import On, Per, StrategyTable, load_config
from persyn.db import grid, lookup
from persyn.db.catalog import Role, Run, RunPrompt, Teacher
from persyn.db.grid import Grid
from persyn.db.results import RouterScore
from persyn.errors import UsageError
from persyn.method import rewards, strategies
from persyn.method.intervals import Interval, Vector, interval, weights
from persyn.method.rewards import Matrix
from persyn.method.strategies import STRATEGIES, StrategyInputs
from persyn.runs import run_file
from persyn.stages import registry
from persyn.stages.strategy_inputs import strategy_inputs

_NO_SCORES = "persyn: the run's router was fitted before PerSyn stored its scores of the grid"


class StrategyFacts(Struct, frozen=True):
    """Estimated reward, quality and cost of a strategy."""

    strategy: str
    #: 0 to 1 for min-max normalisation.
    reward: Interval
    #: In the quality scorer's unit.
    quality: Interval
    #: In the unit of its definition: for the log-likelihood, nats per token or as given by `learnability_per`. None
    #: where no response has it.
    learnability: Interval | None
    #: The oracle's reward minus this strategy's.
    regret: Interval
    #: Share of the gap between the best single teacher (static) and the oracle that it closes.
    gap_closed: Interval | None
    #: Response tokens of the whole run with this strategy, including the grid's if it needs one.
    tokens: float | None
    #: US dollars for them, if all prices and token counts are known.
    cost: float | None
    #: Share of the prompts by teacher, without teachers that are never chosen.
    shares: dict[str, float]


class Comparison(Struct, frozen=True):
    """Strategies under one definition of the reward, best first."""

    run: str
    alpha: float
    normalise: str
    learnability_per: str
    learnability_on: str
    #: Whether this is the run's own reward, to which its router was fitted.
    is_own: bool
    #: Hold-out prompts measured on, and calibration prompts learned from.
    n_holdout: int
    n_calibration: int
    strategies: list[StrategyFacts]
    #: Unavailable strategies, with the reason.
    notes: list[str]
    #: Whether the run is still scoring its grid, so that the figures will change.
    is_partial: bool = False
    #: The definition of learnability.
    learnability: str = "log_likelihood"
    #: The run's router within budgets; empty for another reward than the run's, and where costs are not known.
    frontier: list[Point] = []


@dataclass(frozen=True, slots=True)
class Reward:
    """A definition of the reward; None means the run's own."""

    #: Weight of learnability.
    alpha: float | None = None
    how: rewards.Normalisation | None = None
    #: Unit of learnability, and the part of a response that it is computed on, see `grid.read`.
    per: Per | None = None
    on: On | None = None
    #: The definition of learnability, one of `LEARNABILITIES`.
    learnability: str | None = None

    @property
    def measure(self) -> dict[str, Any]:
        """How learnability is measured, as arguments of `grid.read`."""
        return {"learnability": self.learnability, "per": self.per, "on": self.on}


def compare(
    session: Session, run: Run, reward: Reward | None = None, *, scores: Mapping[str, Matrix | str] | None = None
) -> Comparison:
    """Compare strategies for a run.

    reward: another definition than the run's.
    scores: {strategy: (P, T)} of strategies that read prompts, for all P prompts of the grid in order, or the reason
            why there are none; "persyn" defaults to the run's router, which was fitted to the run's own alpha.
    Raises `UsageError` when the run has no scored hold-out prompt.
    """
    reward = reward or Reward()
    cells = grid.read(session, run, **reward.measure)
    given = dict(scores or {})
    if "persyn" not in given and (stored := router_scores(session, run, cells)) is not None:
        given["persyn"] = stored
    found = _compare(session, run, cells, reward, given)
    return structs.replace(found, frontier=frontier(session, run, cells)) if found.is_own else found


def sweep(session: Session, run: Run, cells: Grid, alphas: Sequence[float], router: Matrix | None) -> list[Comparison]:
    """Compare strategies at each of several weights of learnability; everything else is as in the run.

    cells:  the run's grid.
    router: (P, T) `router_scores` of it.
    Raises `UsageError` when the run has no scored hold-out prompt.
    """
    scores = {} if router is None else {"persyn": router}
    return [_compare(session, run, cells, Reward(alpha), scores) for alpha in alphas]


def _lacking(cells: Grid, alpha: float) -> str:
    """Why no strategy can be measured."""
    if alpha and np.isnan(cells.learnability).all() and not np.isnan(cells.quality).all():
        return "quality and no learnability of its responses: compare strategies at alpha 0"
    return (
        "no scored hold-out prompts to compare strategies on; it needs calibration and holdout above 0, and finished "
        "scoring that did not fail"
    )


def _compare(session: Session, run: Run, cells: Grid, reward: Reward, scores: Mapping[str, Matrix | str]) -> Comparison:
    config = load_config(run.config)
    alpha = config.run.alpha if reward.alpha is None else reward.alpha
    how = reward.how or config.run.normalise
    rewarded = cells.rewards(alpha=alpha, how=how)
    is_known = ~np.isnan(rewarded).all(axis=1)
    holdout, calibration = cells.is_holdout & is_known, ~cells.is_holdout & is_known
    if run_file.n_calibration(config) == 0:
        raise UsageError(
            f"run {run.name!r} uses strategy {config.strategy.kind}, which has no calibration grid to "
            "compare strategies on; use a run of strategy persyn, static, car or oracle"
        )
    if not holdout.any() or not calibration.any():
        raise UsageError(f"run {run.name!r} has {_lacking(cells, alpha)}")
    present = ~np.isnan(rewarded[holdout])
    policies, notes = _policies(strategy_inputs(session, run, cells, rewarded, calibration), present, config.strategy)
    for name, found in scores.items():
        if isinstance(found, str):
            notes.append(f"{name}: {found}")
        else:
            policies[name] = strategies.by_ranking(found[holdout], present)
    if config.strategy.model and config.strategy.name not in scores:
        notes.append(f"{config.strategy.name}: 'persyn compare {run.name}' evaluates it")
    if "persyn" not in policies:
        notes.append("persyn: the run has no router" if run.router_id is None else _NO_SCORES)
    policies["oracle"] = strategies.by_ranking(rewarded[holdout], present)
    counted = _Counted(session, run, cells, holdout)
    measured = grid.measure(run, **reward.measure)
    return Comparison(
        run=run.name,
        alpha=alpha,
        normalise=how,
        learnability_per=measured.per,
        learnability_on=measured.on,
        learnability=measured.kind.name,
        is_own=(alpha, how, measured) == (config.run.alpha, config.run.normalise, grid.measure(run)),
        n_holdout=int(holdout.sum()),
        n_calibration=int(calibration.sum()),
        strategies=_facts(policies, rewarded[holdout], counted),
        notes=notes,
        is_partial=run.stage in registry.reached("score"),
    )


def partial_warning(run: str) -> str:
    """What a reader of a partial comparison must know."""
    return f"run {run} has not scored its whole calibration grid yet; this comparison will change"


def _policies(
    goes_by: StrategyInputs, present: strategies.Present, table: StrategyTable
) -> tuple[dict[str, Matrix], list[str]]:
    """The policies of strategies that read no prompt, and the reasons why others are unavailable."""
    found: dict[str, Matrix] = {}
    notes: list[str] = []
    for name, kind in STRATEGIES.items():
        if kind.policy is not None:
            try:
                found[name] = kind.policy(goes_by, present, table.arguments)
            except ValueError as error:
                notes.append(f"{name}: {error}")
    return found, notes


def router_scores(session: Session, run: Run, cells: Grid) -> Matrix | None:
    """(P, T) scores of the run's router for the grid's prompts; None if it has no router, or no stored scores."""
    if run.router_id is None:
        return None
    row_of = {prompt_id: row for row, prompt_id in enumerate(cells.prompt_ids.tolist())}
    column_of = {teacher_id: column for column, teacher_id in enumerate(cells.teacher_ids.tolist())}
    scores = np.full(cells.quality.shape, np.nan)
    found = session.execute(
        select(RouterScore.prompt_id, RouterScore.teacher_id, RouterScore.score)
        .join(RunPrompt, RunPrompt.prompt_id == RouterScore.prompt_id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET, RouterScore.router_id == run.router_id)
    )
    for prompt_id, teacher_id, score in found:
        scores[row_of[prompt_id], column_of[teacher_id]] = score
    return None if np.isnan(scores).any() else scores


class _Counted:
    """Token counts and costs of the grid's responses."""

    def __init__(self, session: Session, run: Run, cells: Grid, holdout: NDArray[np.bool_]) -> None:
        teachers = lookup.teachers(session, run.id)
        self.names = [teacher.name for teacher in teachers]
        self.quality, self.learnability = cells.quality[holdout], cells.learnability[holdout]
        self.tokens = cells.response_tokens[holdout]
        self.cost = _cost(teachers, cells.prompt_tokens, cells.response_tokens)[holdout]
        self.n_prompts = lookup.n_prompts(session, run.id)
        self.n_grid = len(cells.prompt_ids)
        config = load_config(run.config)
        self.samples, self.asked = config.run.samples, config.generation.samples
        cost = _cost(teachers, cells.prompt_tokens, cells.response_tokens)
        self.grid_tokens = float(np.nansum(cells.response_tokens * cells.n_responses))
        self.grid_cost = float(np.nansum(cost * cells.n_responses))

    def needed(self, strategy: str, policy: Matrix, what: Matrix, of_grid: float) -> float | None:
        """The total for the whole run: the policy's expected amount per prompt, plus the grid's if needed."""
        kind = STRATEGIES.get(strategy)
        uses_grid = kind is None or kind.grid != "none"
        is_asked = np.ones(policy.shape, dtype=np.bool_) if uses_grid else policy > 0
        # A teacher without any known amount makes the sum unknown; single gaps do not.
        if (np.isnan(what).all(axis=0) & is_asked.any(axis=0)).any():
            return None
        if kind is not None and kind.grid == "all":
            return float(np.nanmean(what, axis=0).sum() * self.n_prompts * self.samples)
        each = float(np.nanmean(_expected(policy, what)))
        if not uses_grid:
            return each * self.n_prompts * self.asked
        return of_grid + each * (self.n_prompts - self.n_grid) * self.asked


def _cost(teachers: Sequence[Teacher], prompt_tokens: Matrix, response_tokens: Matrix) -> Matrix:
    """(P, T) US dollars; NaN where a price or a count is unknown."""
    price_in = np.array([np.nan if teacher.price_in is None else teacher.price_in for teacher in teachers])
    price_out = np.array([np.nan if teacher.price_out is None else teacher.price_out for teacher in teachers])
    return np.asarray((prompt_tokens * price_in + response_tokens * price_out) / 1e6)


def _facts(policies: Mapping[str, Matrix], rewarded: Matrix, counted: _Counted) -> list[StrategyFacts]:
    by_prompt = {name: _expected(policy, rewarded) for name, policy in policies.items()}
    means = _drawn(by_prompt)
    quality, learnability = (
        {name: _expected(policy, raw) for name, policy in policies.items()}
        for raw in (counted.quality, counted.learnability)
    )
    drawn_quality, drawn_learnability = _drawn(quality), _drawn(learnability)
    facts = []
    for name, policy in policies.items():
        shares = policy.mean(axis=0)
        facts.append(
            StrategyFacts(
                strategy=name,
                reward=interval(float(by_prompt[name].mean()), means[name]),
                quality=interval(float(np.nanmean(quality[name])), drawn_quality[name]),
                learnability=None
                if np.isnan(learnability[name]).all()
                else interval(float(np.nanmean(learnability[name])), drawn_learnability[name]),
                regret=interval(float((by_prompt["oracle"] - by_prompt[name]).mean()), means["oracle"] - means[name]),
                gap_closed=_gap_closed(name, by_prompt, means),
                tokens=counted.needed(name, policy, counted.tokens, counted.grid_tokens),
                cost=counted.needed(name, policy, counted.cost, counted.grid_cost),
                shares={counted.names[k]: float(shares[k]) for k in np.argsort(-shares, kind="stable") if shares[k]},
            )
        )
    return sorted(facts, key=lambda fact: -fact.reward.mean)


def _drawn(by_prompt: Mapping[str, Vector]) -> dict[str, Vector]:
    """{strategy: (DRAWS,) bootstrap means over prompts}, with the same draws for all strategies.

    Prompts without a value are excluded from the means; a draw without any value gives NaN.
    """
    names = list(by_prompt)
    values = np.stack([by_prompt[name] for name in names], axis=1)  # (P, S)
    is_there = ~np.isnan(values)
    sums, counts = [], []
    for drawn in weights(len(values), seed=0):
        sums.append(drawn @ np.where(is_there, values, 0.0))
        counts.append(drawn @ is_there)
    count = np.concatenate(counts)
    means = np.divide(np.concatenate(sums), count, out=np.full(count.shape, np.nan), where=count > 0)
    return dict(zip(names, means.T, strict=True))


def _expected(policy: Matrix, values: Matrix) -> Vector:
    """(P,) expected value of a policy on each prompt, over the cells that have a value."""
    weight = np.where(np.isnan(values), 0.0, policy)
    total = weight.sum(axis=1)
    summed = (weight * np.nan_to_num(values)).sum(axis=1)
    return np.asarray(np.divide(summed, total, out=np.full(len(total), np.nan), where=total > 0))


def _gap_closed(name: str, by_prompt: Mapping[str, Vector], means: Mapping[str, Vector]) -> Interval | None:
    way = by_prompt["oracle"].mean() - by_prompt["static"].mean()
    if name in ("static", "oracle") or way <= 0:
        return None
    gone = float((by_prompt[name].mean() - by_prompt["static"].mean()) / way)
    ways = means["oracle"] - means["static"]
    parts = np.divide(means[name] - means["static"], ways, out=np.full(len(ways), np.nan), where=ways > 0)
    return interval(gone, parts[~np.isnan(parts)])
