"""Have every teacher answer every calibration and hold-out prompt: a dense grid of prompts x teachers.

A cell of the grid has `[run] samples` responses.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, and_, func, select, true
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher
from persyn.db.results import Response, sample_indices
from persyn.stages.answers import Wanted

_IN_GRID = RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT))


def _wanted(run: Run) -> Select[Any]:
    """Select the grid's responses, present or missing; those that another run got from the same teachers count."""
    samples = sample_indices(load_config(run.config).run.samples)
    return (
        select(RunPrompt.prompt_id, samples.c.sample)
        .select_from(RunPrompt)
        .join(RunTeacher, RunTeacher.run_id == RunPrompt.run_id)
        .join(samples, true())
        .outerjoin(
            Response,
            and_(
                Response.prompt_id == RunPrompt.prompt_id,
                Response.teacher_id == RunTeacher.teacher_id,
                Response.sample == samples.c.sample,
            ),
        )
        .where(RunPrompt.run_id == run.id, _IN_GRID)
    )


def _missing(run: Run, teacher_id: int | None) -> Select[Any]:
    """Select the missing responses of one teacher."""
    return _wanted(run).where(RunTeacher.teacher_id == teacher_id, Response.id.is_(None))


def _expected(session: Session, run: Run) -> int:
    prompts = select(func.count()).select_from(RunPrompt).where(RunPrompt.run_id == run.id, _IN_GRID)
    teachers = select(func.count()).select_from(RunTeacher).where(RunTeacher.run_id == run.id)
    return session.scalars(prompts).one() * session.scalars(teachers).one() * load_config(run.config).run.samples


STAGE = Wanted("calibrate", _wanted, _missing).stage(style=("blue", "-"), expected=_expected)
