"""Have each teacher answer the prompts assigned to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from persyn.db.catalog import Run
from persyn.db.results import Assignment, Response, answers_assignment
from persyn.jobs.queue import Claim
from persyn.stages import answers
from persyn.stages.batch import Batch, Done, Progress


def plan(session: Session, run: Run) -> int:
    """Create jobs for every assigned prompt that its teacher has not answered; return the number of jobs."""
    teachers = answers.teachers_of(session, run.id)
    return sum(answers.plan(session, run, "generate", teacher, _missing(run.id, teacher.id)) for teacher in teachers)


def load(session: Session, job: Claim) -> Batch:
    """Read the prompts in the job's range that its teacher has not answered."""
    return answers.load(session, job, _missing(job.run_id, job.teacher_id))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the responses; saving twice leaves one row per prompt."""
    answers.save(session, job, done)


def progress(session: Session, run: Run) -> Progress:
    """Count the run's assigned prompts by outcome."""
    total, answered, failed = session.execute(
        _assigned(run.id).with_only_columns(func.count(), func.count(Response.text), func.count(Response.failure))
    ).one()
    return Progress(total, answered, failed)


def failures(run: Run) -> Select[Any]:
    """Select the failure reason of each failed response to an assigned prompt."""
    return _assigned(run.id).with_only_columns(Response.failure).where(Response.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Delete responses to assigned prompts that failed for these reasons, so that they are requested again; return how
    many.
    """
    return answers.forget(session, _assigned(run.id), reasons)


def _assigned(run_id: int) -> Select[Any]:
    """Select the run's assigned prompts, answered or not."""
    return (
        select(Assignment.prompt_id)
        .select_from(Assignment)
        .outerjoin(Response, answers_assignment())
        .where(Assignment.run_id == run_id)
    )


def _missing(run_id: int, teacher_id: int | None) -> Select[Any]:
    return (
        select(Assignment.prompt_id)
        .outerjoin(Response, answers_assignment())
        .where(Assignment.run_id == run_id, Assignment.teacher_id == teacher_id, Response.id.is_(None))
    )
