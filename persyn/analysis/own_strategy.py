"""Evaluate a custom strategy on the hold-out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from persyn.config import Per, thaw
from persyn.db import grid
from persyn.db.catalog import Role, Run
from persyn.errors import EngineError
from persyn.llm.host import Host, HostDied
from persyn.llm.protocols import Failed, ModelSpec, Route, Routed
from persyn.method import rewards
from persyn.method.rewards import Matrix, Normalisation
from persyn.settings import Settings
from persyn.stages import assign


@dataclass(frozen=True, slots=True)
class Question:
    """A custom strategy with its inputs from the calibration prompts, and requests for the hold-out prompts."""

    cells: grid.Grid
    spec: ModelSpec
    routes: list[Route]


def read(
    session: Session, run: Run, *, alpha: float | None, how: Normalisation | None, per: Per | None
) -> Question | None:
    """Prepare the evaluation with the settings of `compare.compare`; None if the run's strategy is not a function."""
    config = thaw(run.config)
    if config.strategy.kind != "python":
        return None
    cells = grid.read(session, run, per=per)
    alpha = config.run.alpha if alpha is None else alpha
    rewarded = rewards.combine(cells.quality, cells.learnability, alpha=alpha, how=how or config.run.normalise)
    routes = assign.grid_routes(session, run, Role.HOLDOUT)
    return Question(cells, assign.own_spec(session, run, cells, rewarded), routes)


def scores(question: Question, settings: Settings) -> Matrix | str:
    """(P, T) scores in the grid's order, NaN except for the hold-out, or the reason why there are none.

    The function runs in a separate process. Needs no session.
    """
    host = Host(question.spec, settings.home, load_seconds=settings.load_seconds, stall_seconds=settings.stall_seconds)
    found: dict[int, list[float]] = {}
    try:
        host.submit(question.routes)
        while len(found) < len(question.routes):
            for result in host.receive(timeout=1.0):
                if isinstance(result, Failed):
                    return f"prompt {result.id}: {result.reason}"
                assert isinstance(result, Routed)
                found[result.id] = result.scores
    except (HostDied, EngineError) as error:
        return str(error)
    finally:
        host.close()
    matrix = np.full(question.cells.quality.shape, np.nan)
    for row in np.flatnonzero(question.cells.is_holdout):
        matrix[row] = found[question.cells.prompt_ids[row]]
    return matrix
