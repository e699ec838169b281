"""Every teacher answers every calibration and hold-out prompt: a dense grid of prompts x teachers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher
from persyn.db.results import Response
from persyn.jobs.queue import Claim
from persyn.stages import answers
from persyn.stages.batch import Batch, Done, Progress

_IN_GRID = RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT))


def plan(session: Session, run: Run) -> int:
    """Make jobs for every empty cell of the grid; return how many jobs.

    Cells that another run has filled with the same teacher version are not empty.
    """
    teachers = answers.teachers_of(session, run.id)
    return sum(answers.plan(session, run, "calibrate", teacher, _missing(run.id, teacher.id)) for teacher in teachers)


def load(session: Session, job: Claim) -> Batch:
    """What is missing in the job's part of its teacher's column."""
    return answers.load(session, job, _missing(job.run_id, job.teacher_id))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the responses; saved twice, they are there once."""
    answers.save(session, job, done)


def progress(session: Session, run: Run) -> Progress:
    """Count the grid's cells by what came of them."""
    total, answered, failed = session.execute(
        _cells(run.id).with_only_columns(func.count(), func.count(Response.text), func.count(Response.failure))
    ).one()
    return Progress(total, answered, failed)


def failures(run: Run) -> Select[Any]:
    """What failed in the grid: the reason of each such response."""
    return _cells(run.id).with_only_columns(Response.failure).where(Response.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Have what failed in the grid for these reasons asked again; return how many cells."""
    return answers.forget(session, _cells(run.id), reasons)


def _cells(run_id: int) -> Select[Any]:
    """The grid's cells, filled or not."""
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
    answered = and_(Response.prompt_id == RunPrompt.prompt_id, Response.teacher_id == teacher_id, Response.sample == 0)
    return (
        select(RunPrompt.prompt_id)
        .outerjoin(Response, answered)
        .where(RunPrompt.run_id == run_id, _IN_GRID, Response.id.is_(None))
    )
