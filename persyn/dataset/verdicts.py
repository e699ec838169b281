"""Decide whether a run's quality is a verdict (right or wrong), and count the responses that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Select, and_, case, func
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.results import Response, Score
from persyn.llm import quality
from persyn.method.combined_quality import WRONG


def known_wrong(session: Session, run: Run, of: Callable[..., Select[Any]] = lookup.of_dataset) -> int | None:
    """The number of responses known to be wrong; None if the run's quality is not a verdict.

    of: which of the run's responses, `lookup.of_dataset` or `lookup.of_grid`.
    """
    config = load_config(run.config)
    if not quality.may_be_verdict(config):
        return None
    is_right = Score.value >= 1.0 if quality.is_gated(config) else Score.value == 1.0
    of_run = Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id
    n_wrong, n_others = session.execute(
        of(
            run,
            func.count(case((Score.value == WRONG, 1))),
            func.count(case((and_(Score.value != WRONG, ~is_right), 1))),
        ).join(Score, and_(*of_run))
    ).one()
    return None if n_others else int(n_wrong)
