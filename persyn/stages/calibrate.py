"""Have every teacher answer every calibration and hold-out prompt: a dense grid of prompts x teachers."""

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
    """Create jobs for every empty cell of the grid; return the number of jobs.

    A cell that another run filled with the same teacher version is not empty.
    """
    teachers = answers.teachers_of(session, run.id)
    return sum(answers.plan(session, run, "calibrate", teacher, _missing(run.id, teacher.id)) for teacher in teachers)


def load(session: Session, job: Claim) -> Batch:
    """Read the empty cells in the job's part of its teacher's column."""
    return answers.load(session, job, _missing(job.run_id, job.teacher_id))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the responses; saving twice leaves one row per cell."""
    answers.save(session, job, done)


def progress(session: Session, run: Run) -> Progress:
    """Count the grid's cells by outcome."""
    total, answered, failed = session.execute(
        _cells(run.id).with_only_columns(func.count(), func.count(Response.text), func.count(Response.failure))
    ).one()
    return Progress(total, answered, failed)


def failures(run: Run) -> Select[Any]:
    """Select the failure reason of each failed response in the grid."""
    return _cells(run.id).with_only_columns(Response.failure).where(Response.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Delete the grid's responses that failed for these reasons, so that they are requested again; return how many."""
    return answers.forget(session, _cells(run.id), reasons)


def _cells(run_id: int) -> Select[Any]:
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
    answered = and_(Response.prompt_id == RunPrompt.prompt_id, Response.teacher_id == teacher_id, Response.sample == 0)
    return (
        select(RunPrompt.prompt_id)
        .outerjoin(Response, answered)
        .where(RunPrompt.run_id == run_id, _IN_GRID, Response.id.is_(None))
    )
