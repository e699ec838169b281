"""Have each teacher answer the prompts assigned to it."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Integer, Select, func, literal, select
from sqlalchemy.orm import Session

from persyn.db.catalog import Run, RunPrompt
from persyn.db.results import Assignment, Response, answers_assignment
from persyn.stages.answers import Wanted


def _wanted(run: Run) -> Select[Any]:
    """Select the responses to the run's assigned prompts, present or missing."""
    wanted = (
        select(Assignment.prompt_id, literal(0, Integer).label("sample"))
        .select_from(Assignment)
        .outerjoin(Response, answers_assignment())
        .where(Assignment.run_id == run.id)
    )
    return cast(Select[Any], wanted)


def _missing(run: Run, teacher_id: int | None) -> Select[Any]:
    return _wanted(run).where(Assignment.teacher_id == teacher_id, Response.id.is_(None))


def _expected(session: Session, run: Run) -> int:
    return session.scalars(select(func.count()).select_from(RunPrompt).where(RunPrompt.run_id == run.id)).one()


STAGE = Wanted("generate", _wanted, _missing).stage(style=("red", "-"), expected=_expected)
