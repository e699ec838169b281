"""Have every teacher answer every calibration and hold-out prompt: a dense grid of prompts x teachers."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher
from persyn.db.results import Response
from persyn.stages.answers import Cells

_IN_GRID = RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT))


def _all(run_id: int) -> Select[Any]:
    """Select the grid's cells, filled or empty."""
    return (
        select(RunPrompt.prompt_id)
        .select_from(RunPrompt)
        .join(RunTeacher, RunTeacher.run_id == RunPrompt.run_id)
        .outerjoin(
            Response,
            and_(
                Response.prompt_id == RunPrompt.prompt_id,
                Response.teacher_id == RunTeacher.teacher_id,
                Response.sample == 0,
            ),
        )
        .where(RunPrompt.run_id == run_id, _IN_GRID)
    )


def _missing(run_id: int, teacher_id: int | None) -> Select[Any]:
    """Select the empty cells of a teacher's column; one that another run filled with the same version is not empty."""
    answered = and_(Response.prompt_id == RunPrompt.prompt_id, Response.teacher_id == teacher_id, Response.sample == 0)
    return (
        select(RunPrompt.prompt_id)
        .outerjoin(Response, answered)
        .where(RunPrompt.run_id == run_id, _IN_GRID, Response.id.is_(None))
    )


def _expected(session: Session, run: Run) -> int:
    prompts = select(func.count()).select_from(RunPrompt).where(RunPrompt.run_id == run.id, _IN_GRID)
    teachers = select(func.count()).select_from(RunTeacher).where(RunTeacher.run_id == run.id)
    return session.scalars(prompts).one() * session.scalars(teachers).one()


STAGE = Cells("calibrate", _all, _missing).stage(style=("blue", "-"), expected=_expected)
