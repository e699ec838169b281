"""A run's own strategy, asked about the hold-out: what it would have come to stands beside the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from persyn.config import Per, thaw
from persyn.db import grid
from persyn.db.catalog import Role, Run
from persyn.db.connect import Database
from persyn.errors import EngineError
from persyn.llm import host
from persyn.llm.host import HostDied
from persyn.llm.protocols import Failed, ModelSpec, Route, Routed
from persyn.method import rewards
from persyn.method.rewards import Matrix, Normalisation
from persyn.settings import Settings
from persyn.stages import assign


@dataclass(frozen=True, slots=True)
class Question:
    """The function, told the calibration prompts' rewards, and the hold-out prompts that it is asked about."""

    cells: grid.Grid
    spec: ModelSpec
    routes: list[Route]


def read(
    session: Session, run: Run, *, alpha: float | None, how: Normalisation | None, per: Per | None
) -> Question | None:
    """What is to be asked at these dials, as `compare.compare` takes them; None when the strategy is no function."""
    config = thaw(run.config)
    if config.strategy.kind != "python":
        return None
    cells = grid.read(session, run, per=per)
    alpha = config.run.alpha if alpha is None else alpha
    rewarded = rewards.combine(cells.quality, cells.learnability, alpha=alpha, how=how or config.run.normalise)
    routes = assign.grid_routes(session, run, Role.HOLDOUT)
    return Question(cells, assign.own_spec(session, run, cells, rewarded), routes)


def scores(question: Question, settings: Settings) -> Matrix | str:
    """(P, T) in the grid's order, NaN but for the hold-out; or why there are none. Needs no session.

    The function is asked in a process of its own.
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


def ask(
    database: Database,
    run_id: int,
    settings: Settings,
    *,
    alpha: float | None = None,
    how: Normalisation | None = None,
    per: Per | None = None,
) -> dict[str, Matrix | str]:
    """The scores of a run's own strategy, as `compare.compare` takes them; empty when the strategy is no function."""
    with database.read() as session:
        question = read(session, session.get_one(Run, run_id), alpha=alpha, how=how, per=per)
    return {} if question is None else {question.spec.model: scores(question, settings)}
