"""Where one response comes from: everything the store knows of a prompt in a run."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from sqlalchemy import and_, select
from sqlalchemy.orm import Session, aliased

from persyn.db.catalog import Prompt, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.results import Assignment, Response, RouterScore, Score
from persyn.db.work import Event, Job
from persyn.errors import UsageError

Row = dict[str, Any]


class Trace(Struct, frozen=True):
    """A prompt's way through a run."""

    prompt_id: int
    role: str
    text: str
    #: The teacher it was given to; None before it has one.
    teacher: str | None
    assignment: Row
    #: One row per teacher, best first.
    router_scores: list[Row]
    #: The responses of the run's teachers, with their raw scores and provenance.
    responses: list[Row]
    #: What happened to the jobs that made them.
    events: list[Row]


def trace(session: Session, run: Run, prompt_id: int) -> Trace:
    """Gather a prompt's history in a run; `UsageError` when the run has no such prompt."""
    place = session.execute(
        select(Prompt.text, RunPrompt.role)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, Prompt.id == prompt_id)
    ).one_or_none()
    if place is None:
        raise UsageError(f"run {run.name!r} has no prompt {prompt_id}; a dataset's rows carry their prompt_id")
    assignment = _rows(
        session,
        select(
            Teacher.name,
            Assignment.reason,
            Assignment.score,
            Assignment.margin,
            Assignment.job_id,
            Assignment.created_at,
        )
        .join(Teacher, Teacher.id == Assignment.teacher_id)
        .where(Assignment.run_id == run.id, Assignment.prompt_id == prompt_id),
    )
    responses = _rows(session, _responses(run, prompt_id))
    jobs = {row["job_id"] for row in [*assignment, *responses] if row["job_id"] is not None}
    return Trace(
        prompt_id=prompt_id,
        role=place.role,
        text=place.text,
        teacher=assignment[0].pop("name") if assignment else None,
        assignment=assignment[0] if assignment else {},
        router_scores=_rows(session, _router_scores(run, prompt_id)),
        responses=responses,
        events=_rows(session, _events(jobs)),
    )


def _router_scores(run: Run, prompt_id: int) -> Any:
    return (
        select(Teacher.name.label("teacher"), RouterScore.score)
        .join(Teacher, Teacher.id == RouterScore.teacher_id)
        .where(RouterScore.router_id == run.router_id, RouterScore.prompt_id == prompt_id)
        .order_by(RouterScore.score.desc())
    )


def _responses(run: Run, prompt_id: int) -> Any:
    quality, likelihood = aliased(Score), aliased(Score)
    return (
        select(
            Teacher.name.label("teacher"),
            Response.text,
            Response.failure,
            Response.finish_reason,
            quality.value.label("quality"),
            (likelihood.value / likelihood.n_tokens).label("learnability"),
            Response.response_tokens.label("tokens"),
            Response.seed,
            Response.engine,
            Teacher.revision,
            Response.job_id,
            Job.owner.label("worker"),
            Response.created_at,
        )
        .join(Teacher, Teacher.id == Response.teacher_id)
        .join(RunTeacher, and_(RunTeacher.teacher_id == Teacher.id, RunTeacher.run_id == run.id))
        .outerjoin(quality, and_(quality.response_id == Response.id, quality.scorer_id == run.quality_scorer_id))
        .outerjoin(
            likelihood,
            and_(likelihood.response_id == Response.id, likelihood.scorer_id == run.learnability_scorer_id),
        )
        .outerjoin(Job, Job.id == Response.job_id)
        .where(Response.prompt_id == prompt_id)
        .order_by(RunTeacher.position, Response.sample)
    )


def _events(jobs: set[int]) -> Any:
    return (
        select(Event.at, Event.actor, Event.job_id, Event.fence, Event.from_state, Event.to_state, Event.detail)
        .where(Event.job_id.in_(jobs))
        .order_by(Event.id)
    )


def _rows(session: Session, query: Any) -> list[Row]:
    return [dict(row._mapping) for row in session.execute(query)]
