"""Quality of several scorers: whom to ask about a response.

Gates are asked first: a scorer with a weight is asked only about responses that passed all of them. The quality that
follows is stored by `db.combined`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, true
from sqlalchemy.orm import Session, aliased

from persyn.config import load_config
from persyn.db import combined
from persyn.db.catalog import Run
from persyn.db.results import Response, Score
from persyn.llm import quality
from persyn.method import combined_quality


def rounds(run: Run) -> int:
    """How often scorers are asked until a response has its quality: gates come before the others."""
    return len(set(quality.gates(load_config(run.config))))


def is_wanted(session: Session, run: Run, scorer_id: int) -> ColumnElement[bool]:
    """Whether a scorer is to be asked about a response: it has not scored it, and the quality depends on its score."""
    lacks = ~combined.has(scorer_id)
    found = combined.of_run(session, run)
    if found is None or scorer_id not in found.parts:
        return lacks
    earlier = [] if scorer_id in found.gates else found.gates
    passed = (combined.has(gate, at_least=combined_quality.PASSED) for gate in earlier)
    return and_(lacks, ~combined.has(found.id), *passed)


def is_undecided(session: Session, run: Run) -> ColumnElement[bool]:
    """Whether failures of the scorers matter to a response: several are combined only as long as none has decided."""
    if (found := combined.of_run(session, run)) is None:
        return true()
    score = aliased(Score)
    return ~exists().where(score.response_id == Response.id, score.scorer_id == found.id, score.value.is_not(None))


def store(session: Session, run: Run, responses: Select[Any]) -> None:
    """Store the quality of responses whose scores decide it; nothing to do where one scorer is the quality."""
    if (found := combined.of_run(session, run)) is not None:
        combined.store(session, found, responses)


def forget_stale(session: Session, run: Run, responses: Select[Any]) -> int:
    """Delete failed qualities that do not follow from the scores any more; return their number."""
    found = combined.of_run(session, run)
    return 0 if found is None else combined.forget_stale(session, found, responses)
