"""Have each teacher answer the prompts assigned to it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from persyn.db.catalog import Run, RunPrompt
from persyn.db.results import Assignment, Response, answers_assignment
from persyn.stages.answers import Cells


def _all(run_id: int) -> Select[Any]:
    """Select the run's assigned prompts, answered or not."""
    return (
        select(Assignment.prompt_id)
        .select_from(Assignment)
        .outerjoin(Response, answers_assignment())
        .where(Assignment.run_id == run_id)
    )


def _missing(run_id: int, teacher_id: int | None) -> Select[Any]:
    return _all(run_id).where(Assignment.teacher_id == teacher_id, Response.id.is_(None))


def _expected(session: Session, run: Run) -> int:
    return session.scalars(select(func.count()).select_from(RunPrompt).where(RunPrompt.run_id == run.id)).one()


STAGE = Cells("generate", _all, _missing).stage(style=("red", "-"), expected=_expected)
