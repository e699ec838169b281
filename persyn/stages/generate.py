"""Each teacher answers the prompts assigned to it, and only those."""

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
    """Make jobs for every assigned prompt that its teacher has not answered yet; return how many jobs."""
    teachers = answers.teachers_of(session, run.id)
    return sum(answers.plan(session, run, "generate", teacher, _missing(run.id, teacher.id)) for teacher in teachers)


def load(session: Session, job: Claim) -> Batch:
    """What the job's teacher still owes an answer to."""
    return answers.load(session, job, _missing(job.run_id, job.teacher_id))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the responses; saved twice, they are there once."""
    answers.save(session, job, done)


def progress(session: Session, run: Run) -> Progress:
    """Count the run's assigned prompts by what came of them."""
    total, answered, failed = session.execute(
        _assigned(run.id).with_only_columns(func.count(), func.count(Response.text), func.count(Response.failure))
    ).one()
    return Progress(total, answered, failed)


def failures(run: Run) -> Select[Any]:
    """What failed of the assigned prompts: the reason of each such response."""
    return _assigned(run.id).with_only_columns(Response.failure).where(Response.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Have assigned prompts whose answer failed for these reasons asked again; return how many."""
    return answers.forget(session, _assigned(run.id), reasons)


def _assigned(run_id: int) -> Select[Any]:
    """The run's assigned prompts, answered or not."""
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
