"""Gather the inputs of a strategy from the store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.grid import Grid
from persyn.method.rewards import Matrix
from persyn.method.strategies import StrategyInputs


def strategy_inputs(
    session: Session, run: Run, cells: Grid, rewarded: Matrix, learn: NDArray[np.bool_]
) -> StrategyInputs:
    """The inputs of a strategy: rewards of the prompts it may learn from, and metadata of the run's teachers.

    rewarded: (P, T) rewards of the grid.
    learn:    (P,) which prompts may be learned from.
    """
    teachers = lookup.teachers(session, run.id)
    student = load_config(run.config).student
    return StrategyInputs(
        rewards=rewarded[learn],
        quality=cells.quality[learn],
        learnability=cells.learnability[learn],
        sizes=np.array([teacher.params_b for teacher in teachers], dtype=np.float64),
        families=[teacher.family for teacher in teachers],
        family=student.family if student else None,
        teachers=[teacher.name for teacher in teachers],
        price_in=np.array([teacher.price_in for teacher in teachers], dtype=np.float64),
        price_out=np.array([teacher.price_out for teacher in teachers], dtype=np.float64),
        is_log_likelihood=cells.is_log_likelihood,
    )
