"""Whether a run's quality says right or wrong, and what it says of the responses that the dataset is made of."""

from __future__ import annotations

from sqlalchemy import and_, case, func, select
from sqlalchemy.orm import Session

from persyn.config import thaw
from persyn.db.catalog import Run
from persyn.db.results import Assignment, Response, Score, answers_assignment

#: A value of quality that says that a response is wrong.
WRONG = 0.0


def known_wrong(session: Session, run: Run) -> int | None:
    """How many of a run's assigned responses are known to be wrong; None where its quality is no verdict."""
    if not thaw(run.config).quality.may_be_verdict:
        return None
    of_run = Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id
    n_wrong, n_others = session.execute(
        select(
            func.count(case((Score.value == WRONG, 1))),
            func.count(case((Score.value.not_in((WRONG, 1.0)), 1))),
        )
        .select_from(Assignment)
        .join(Response, answers_assignment())
        .join(Score, and_(*of_run))
        .where(Assignment.run_id == run.id)
    ).one()
    return None if n_others else int(n_wrong)
