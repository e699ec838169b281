"""Decide whether a run's quality is a verdict (right or wrong), and count the assigned responses that are wrong."""

from __future__ import annotations

from sqlalchemy import and_, case, func, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.results import Assignment, Response, Score
from persyn.llm.engines import ENGINES

#: The quality of a wrong response.
WRONG = 0.0


def known_wrong(session: Session, run: Run) -> int | None:
    """The number of a run's assigned responses known to be wrong; None if its quality is not a verdict."""
    kind = ENGINES.get(load_config(run.config).quality.kind)
    if kind is None or not kind.may_be_verdict:
        return None
    of_run = Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id
    n_wrong, n_others = session.execute(
        select(
            func.count(case((Score.value == WRONG, 1))),
            func.count(case((Score.value.not_in((WRONG, 1.0)), 1))),
        )
        .select_from(Assignment)
        .join(Response, lookup.in_dataset(run))
        .join(Score, and_(*of_run))
        .where(Assignment.run_id == run.id)
    ).one()
    return None if n_others else int(n_wrong)
