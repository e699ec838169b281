"""Evaluate a custom strategy on the hold-out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from persyn.analysis.compare import Reward
from persyn.config import load_config
from persyn.db import grid
from persyn.db.catalog import Role, Run
from persyn.db.connect import Database
from persyn.errors import EngineError
from persyn.llm import host
from persyn.llm.host import HostDied
from persyn.llm.protocols import Failed, ModelSpec, Route, Routed
from persyn.method.rewards import Matrix
from persyn.settings import Settings
from persyn.stages import assign


@dataclass(frozen=True, slots=True)
class StrategyRequest:
    """A custom strategy with its inputs from the calibration prompts, and requests for the hold-out prompts."""

    cells: grid.Grid
    spec: ModelSpec
    routes: list[Route]


def read(session: Session, run: Run, reward: Reward) -> StrategyRequest | None:
    """Prepare the evaluation with the settings of `compare.compare`; None if the run's strategy is not a function."""
    config = load_config(run.config)
    if not config.strategy.model:
        return None
    cells = grid.read(session, run, **reward.measure)
    rewarded = cells.rewards(alpha=reward.alpha, how=reward.how)
    routes = assign.grid_routes(session, run, Role.HOLDOUT)
    return StrategyRequest(cells, assign.own_spec(session, run, cells, rewarded), routes)


def scores(question: StrategyRequest, settings: Settings) -> Matrix | str:
    """(P, T) scores in the grid's order, NaN except for the hold-out, or the reason why there are none.

    The function runs in a separate process. Needs no session.
    """
    limits = {"load_seconds": settings.load_seconds, "stall_seconds": settings.stall_seconds}
    try:
        results = host.ask(question.spec, question.routes, settings.home, **limits)
    except (HostDied, EngineError) as error:
        return str(error)
    found: dict[int, list[float]] = {}
    for result in results:
        if isinstance(result, Failed):
            return f"prompt {result.id}: {result.reason}"
        assert isinstance(result, Routed)
        found[result.id] = result.scores
    matrix = np.full(question.cells.quality.shape, np.nan)
    for row in np.flatnonzero(question.cells.is_holdout):
        matrix[row] = found[question.cells.prompt_ids[row]]
    return matrix


def ask(database: Database, run_id: int, settings: Settings, reward: Reward) -> dict[str, Matrix | str]:
    """The scores of a run's custom strategy, as input of `compare.compare`; empty if the strategy is not a function."""
    with database.read() as session:
        question = read(session, session.get_one(Run, run_id), reward)
    return {} if question is None else {question.spec.model: scores(question, settings)}
