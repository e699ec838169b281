"""Assign a teacher to every prompt: the router's best, or the best observed teacher for a calibration prompt.

A custom strategy replaces the router. A run with any other strategy is assigned by that strategy, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from persyn.config import StrategyTable, load_config
from persyn.db import bulk, grid, lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.grid import Grid
from persyn.db.results import Assignment, Router, RouterScore
from persyn.errors import EngineError, UsageError
from persyn.jobs.queue import Claim
from persyn.llm.protocols import Failed, ModelSpec, Route, Routed
from persyn.method import rewards, strategies
from persyn.method.strategies import STRATEGIES, Strategy
from persyn.router import strategy as own
from persyn.stages import limits, unassigned, verdict
from persyn.stages.batch import (
    TURNS,
    Batch,
    Done,
    JobPlan,
    Progress,
    conversation,
    in_part,
    make_jobs,
    seed_of,
    to_wire,
)
from persyn.stages.labels import LABELLED, labels
from persyn.stages.stage import Stage
from persyn.stages.strategy_inputs import strategy_inputs

#: The [router] options that still apply after the router has been fitted.
_ROUTE_OPTIONS = ("dtype", "batch_tokens")
#: Routing is one forward pass and writes no tokens, so a routing job holds this many times more prompts.
_ROUTING_IS_CHEAP = 8
#: Prompts assigned per batch when no model is involved.
_CHUNK = 10_000


def plan(session: Session, run: Run) -> int:
    """Assign the prompts that need no model and create jobs for the others; return the number of jobs.

    Whether a router assigns them is decided by the verdict, once per run; within limits, see `limits.verdict_against`.
    """
    kind = _kind(run)
    if kind.decided_by != "policy":
        _assign_calibration(session, run)
    decided = verdict.decide(session, run) if kind.decided_by == "router" else None
    if load_config(run.config).strategy.is_limited:
        against = limits.verdict_against(session, run, decided)
        expected = limits.expect(session, run, against)
        jobs = _make_jobs(session, run, unassigned.unscored(run)) if expected.slope else 0
        if not jobs:
            limits.assign(session, run, against, expected)
        return jobs
    if decided is not None and not decided.routes:
        _assign_best(session, run, decided)
        return 0
    match kind.decided_by:
        case "router" | "function":
            return _make_jobs(session, run, unassigned.missing(run.id))
        case "rewards":
            _assign_unrewarded(session, run)
        case "policy":
            _follow(session, run)
    return 0


def _make_jobs(session: Session, run: Run, prompts: Select[Any]) -> int:
    size = run.config["run"]["job_prompts"] * _ROUTING_IS_CHEAP
    return make_jobs(session, JobPlan(run.id, "assign", route_spec(session, run), size=size), prompts)


def load(session: Session, job: Claim) -> Batch:
    """Read the job's prompts that have no assignment yet, or no scores where they are assigned together."""
    run = session.get_one(Run, job.run_id)
    is_limited = load_config(run.config).strategy.is_limited
    prompts = session.execute(
        in_part(unassigned.unscored(run) if is_limited else unassigned.missing(run.id), job)
        .join(Prompt, Prompt.id == RunPrompt.prompt_id)
        .add_columns(Prompt.id, *TURNS, *LABELLED)
    )
    reads_meta, fields = _kind(run).decided_by == "function", load_config(run.config).router.features
    return Batch(
        route_spec(session, run),
        [
            Route(
                prompt.id,
                conversation(prompt),
                to_wire(prompt.meta) if reads_meta else {},
                {} if reads_meta else labels(prompt, fields),
            )
            for prompt in prompts
        ],
    )


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store all router scores and the winning teacher; saving twice leaves one row per prompt.

    Within limits, no prompt has a winner before all have scores.
    """
    run = session.get_one(Run, job.run_id)
    strategy = load_config(run.config).strategy
    teacher_ids = [teacher.id for teacher in lookup.teachers(session, run.id)]
    prompt_ids, rows = [item.request.id for item in done], [_scores(item, strategy) for item in done]
    scores = [
        {"router_id": run.router_id, "prompt_id": prompt_id, "teacher_id": teacher_id, "score": score}
        for prompt_id, row in zip(prompt_ids, rows, strict=True)
        for teacher_id, score in zip(teacher_ids, row, strict=True)
        if run.router_id is not None
    ]
    bulk.insert_new(session, RouterScore, scores)
    if strategy.is_limited:
        return
    reason = f"{strategy.kind}: {strategy.name}"
    if _kind(run).decided_by == "router":
        reason = f"router: {session.get_one(Router, run.router_id).kind}"
    values = np.where(unassigned.present(session, teacher_ids, prompt_ids), rows, np.nan)
    winners, margins = _best(values)
    further = unassigned.further(run, teacher_ids, values, winners)
    sample = unassigned.first_sample(run)
    assignments = [
        {
            "run_id": job.run_id,
            "prompt_id": prompt_id,
            "teacher_id": teacher_ids[winner],
            "score": row[winner],
            "margin": margin,
            "sample": sample,
            "reason": reason if row[winner] == max(row) else "fallback: no response of the best teacher was imported",
            "further": later,
            "job_id": job.id,
        }
        for prompt_id, row, winner, margin, later in zip(prompt_ids, rows, winners, margins, further, strict=True)
    ]
    bulk.insert_new(session, Assignment, assignments)


def progress(session: Session, run: Run) -> Progress:
    """Count the run's prompts with and without an assignment."""
    assigned = select(func.count()).select_from(Assignment).where(Assignment.run_id == run.id)
    return Progress(lookup.n_prompts(session, run.id), session.scalars(assigned).one(), failed=0)


def _kind(run: Run) -> Strategy:
    return STRATEGIES.require(load_config(run.config).strategy.kind, "strategy")


def _scores(item: Done, strategy: StrategyTable) -> list[float]:
    if isinstance(item.result, Failed) and strategy.model:
        raise EngineError(
            f"{strategy.name} has no scores for prompt {item.request.id}: {item.result.reason} "
            "(to use a changed function, start a run under another name; it shares all responses and scores)"
        )
    if isinstance(item.result, Failed):
        raise EngineError(f"the router cannot score prompt {item.request.id}: {item.result.reason}")
    assert isinstance(item.result, Routed)
    return item.result.scores


def _best(matrix: rewards.Matrix) -> tuple[list[int], list[float | None]]:
    """The column of each row's highest value (NaN ignored), and its margin over the second highest, if any."""
    if not len(matrix):
        return [], []
    falling = -np.sort(-matrix, axis=1)  # NaN sorts last
    margins = falling[:, 0] - falling[:, 1]
    return np.nanargmax(matrix, axis=1).tolist(), [None if np.isnan(margin) else margin for margin in margins.tolist()]


def _assign_calibration(session: Session, run: Run) -> None:
    """Assign calibration prompts to the teacher with the best reward; leave those without scores to the router.

    The only scored response to a prompt has no reward, and is the best.
    """
    for cells in grid.parts(session, run):
        _assign_part(session, run, cells)


def _assign_part(session: Session, run: Run, cells: Grid) -> None:
    rewarded = cells.rewards()
    is_scored = ~np.isnan(cells.quality) & (~np.isnan(cells.learnability) | (cells.alpha == 0))
    known = is_scored.any(axis=1)
    values = np.where(is_scored, np.nan_to_num(rewarded), np.nan)[known]
    winners, margins = _best(values)
    further = unassigned.further(run, cells.teacher_ids.tolist(), values, winners)
    chosen = rewarded[known, winners]
    between = int(cells.prompt_ids[0]), int(cells.prompt_ids[-1])
    first, answered = unassigned.first_sample(run), unassigned.first_answered(session, run, between)
    scores = [None if np.isnan(score) else score for score in chosen.tolist()]
    rows = zip(cells.prompt_ids[known].tolist(), scores, winners, margins, further, strict=True)
    bulk.insert_new(
        session,
        Assignment,
        [
            {
                "run_id": run.id,
                "prompt_id": prompt_id,
                "teacher_id": int(cells.teacher_ids[winner]),
                "score": score,
                "margin": margin,
                "sample": first if first is None else answered.get((prompt_id, int(cells.teacher_ids[winner])), 0),
                "reason": "calibration",
                "further": later,
                "job_id": None,
            }
            for prompt_id, score, winner, margin, later in rows
        ],
    )


def _assign_unrewarded(session: Session, run: Run) -> None:
    """Assign prompts without any reward to the teacher that is best on average."""
    if session.execute(unassigned.missing(run.id).limit(1)).first() is None:
        return
    ranking = grid.means(grid.parts(session, run)).ranking
    if np.isnan(ranking).all():
        raise UsageError(f"strategy {_kind(run).name}: no response of the calibration grid has a reward")
    _assign_rest(session, run, lambda present: strategies.by_ranking(ranking, present), _kind(run).name)


def _follow(session: Session, run: Run) -> None:
    """Assign the remaining prompts by a strategy that reads no prompt."""
    strategy = load_config(run.config).strategy
    cells = grid.read(session, run)
    goes_by = strategy_inputs(session, run, cells, cells.rewards(), ~cells.is_holdout)

    def policy(present: NDArray[np.bool_]) -> rewards.Matrix:
        try:
            return strategies.policy(strategy.kind, goes_by, present, **strategy.arguments)
        except ValueError as error:
            raise UsageError(f"strategy {strategy.kind}: {error}") from error

    _assign_rest(session, run, policy, strategy.kind)


def _assign_best(session: Session, run: Run, decided: verdict.Decision) -> None:
    """Assign the remaining prompts to the best single teacher."""
    place = {teacher_id: -rank for rank, teacher_id in enumerate(decided.ranking)}
    ranking = np.array([place[teacher.id] for teacher in lookup.teachers(session, run.id)], dtype=np.float64)
    _assign_rest(session, run, lambda present: strategies.by_ranking(ranking, present), decided.reason)


def _assign_rest(
    session: Session, run: Run, policy: Callable[[NDArray[np.bool_]], rewards.Matrix], reason: str
) -> None:
    """Assign the remaining prompts; random draws depend only on seed and prompt.

    policy: the (P, T) policy of P prompts, given which teachers can answer them.
    """
    kind, teacher_ids = load_config(run.config).strategy.kind, [each.id for each in lookup.teachers(session, run.id)]
    missing = unassigned.missing(run.id).join(Prompt, Prompt.id == RunPrompt.prompt_id).add_columns(Prompt.content_hash)
    missing = missing.order_by(RunPrompt.prompt_id).limit(_CHUNK)
    has_fallback, last = load_config(run.config).fallback is not None, 0
    while chunk := session.execute(missing.where(RunPrompt.prompt_id > last)).all():
        prompt_ids = [prompt_id for prompt_id, _ in chunk]
        last = prompt_ids[-1]
        lots = np.array([seed_of(run.seed, content_hash, kind, 0) / 2**63 for _, content_hash in chunk])
        present = unassigned.present(session, teacher_ids, prompt_ids)
        columns = strategies.draw(policy(present), lots).tolist()
        values = strategies.places(policy, present, lots) if has_fallback else np.empty((len(chunk), 0))
        further = unassigned.further(run, teacher_ids, values, columns)
        bulk.insert_new(
            session,
            Assignment,
            [
                {
                    "run_id": run.id,
                    "prompt_id": prompt_id,
                    "teacher_id": teacher_ids[column],
                    "score": None,
                    "margin": None,
                    "sample": unassigned.first_sample(run),
                    "reason": reason,
                    "further": later,
                    "job_id": None,
                }
                for prompt_id, column, later in zip(prompt_ids, columns, further, strict=True)
            ],
        )


def route_spec(session: Session, run: Run) -> ModelSpec:
    """The model that scores the teachers for a prompt."""
    if _kind(run).decided_by == "function":
        cells = grid.read(session, run)
        return own_spec(session, run, cells, cells.rewards())
    router, config = session.get_one(Router, run.router_id), load_config(run.config).router
    if config.engine == "fake":
        return ModelSpec("fake", config.backbone, options={**config.options, "teachers": len(router.teacher_ids)})
    options = {key: config.options[key] for key in _ROUTE_OPTIONS if key in config.options}
    reads_states = not {"backbone", "embedding"}.isdisjoint(router.metrics.get("encoders", ["backbone"]))
    gpus = config.gpus if reads_states else 0
    return ModelSpec("router", router.path, gpus=gpus, options={**options, "sha256": router.sha256})


def own_spec(session: Session, run: Run, cells: grid.Grid, rewarded: rewards.Matrix) -> ModelSpec:
    """The spec of a run's custom strategy, with its inputs from the calibration prompts of the grid."""
    strategy = load_config(run.config).strategy
    prompts = [
        {"messages": route.messages, "meta": route.meta} for route in grid_routes(session, run, Role.CALIBRATION)
    ]
    goes_by = replace(strategy_inputs(session, run, cells, rewarded, ~cells.is_holdout), prompts=prompts)
    options = {"known": own.pack(goes_by), "options": strategy.options}
    return ModelSpec("strategy", strategy.model, strategy.revision, strategy.gpus, options)


def grid_routes(session: Session, run: Run, *roles: Role) -> list[Route]:
    """The grid's prompts with these roles, in grid order, as requests to a custom strategy."""
    prompts = session.execute(
        select(Prompt.id, *TURNS, Prompt.meta)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role.in_(roles))
        .order_by(Prompt.id)
    )
    return [Route(prompt.id, conversation(prompt), to_wire(prompt.meta)) for prompt in prompts]


STAGE = Stage(
    name="assign",
    style=("green", "-."),
    plan=plan,
    load=load,
    spec=lambda session, run, _: route_spec(session, run),
    save=save,
    progress=progress,
    expected=lambda session, run: lookup.n_prompts(session, run.id),
)
