"""Take snapshots of a running run.

A snapshot reads jobs through an index and only the latest responses, so it can be taken every second for a run of any
size. A tally counts all rows, which takes time proportional to their number.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from msgspec import Struct
from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Run, RunState, RunTeacher, Teacher
from persyn.db.results import NO_TEXT, Response
from persyn.db.text import reason
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, Outage
from persyn.jobs import owner
from persyn.runs import pipeline
from persyn.stages.batch import Progress
from persyn.stages.registry import STAGES

_OPEN = (JobState.QUEUED, JobState.RUNNING)
#: A run is idle when no worker has held a job for this long: between two jobs a worker holds none for a moment.
IDLE = timedelta(seconds=3)
#: The window for rates per second.
RECENT = timedelta(seconds=60)
#: Of more responses than this, only the latest are considered, with the time span in which they arrived.
_MOST_RECENT = 20_000
#: A larger share of failed rows indicates a systematic problem.
MANY_FAILED = 0.05
#: Reasons of failed rows that are listed.
_MOST_REASONS = 3
#: Distinct errors that are listed.
_MOST_ERRORS = 3


class HeldJob(Struct, frozen=True):
    """A job in progress."""

    worker: str
    job: int
    #: The answering teacher, or the queue of a job without a teacher.
    model: str
    prompts: int
    #: Since this worker claimed it.
    seconds: float
    #: Remaining time of the lease; negative if it has expired.
    lease_seconds: float


class TeacherRate(Struct, frozen=True):
    """One teacher's recent rate in the run's current stage, per second."""

    teacher: str
    responses: float
    tokens: float


class JobErrors(Struct, frozen=True):
    """An error of jobs that will be retried."""

    error: str
    jobs: int


class ServerWait(Struct, frozen=True):
    """A server that the run is waiting for."""

    #: The teacher behind it, or the queue of jobs without one.
    model: str
    error: str
    #: Waiting time so far, time until the next attempt, and the limit on waiting.
    seconds: float
    retry_seconds: float
    limit_seconds: float


class Snapshot(Struct, frozen=True):
    """A snapshot of a run."""

    at: datetime
    state: RunState
    stage: str
    error: str | None
    #: When the run was started, and the age of its current stage.
    began: datetime
    stage_seconds: float
    #: Jobs of the current stage by state.
    jobs: dict[JobState, int]
    #: Rows at planning time of its waiting and running jobs, and of all jobs except cancelled ones, whose rows are
    #: planned again.
    open_rows: int
    planned_rows: int
    held: list[HeldJob]
    paces: list[TeacherRate]
    troubles: list[JobErrors]
    waits: list[ServerWait]

    @property
    def is_idle(self) -> bool:
        """Whether jobs of a running run are waiting, but neither for a worker that holds one nor for a server."""
        has_jobs = self.state is RunState.RUNNING and JobState.QUEUED in self.jobs
        return has_jobs and not self.held and not self.waits


class Failures(Struct, frozen=True):
    """Rows of a stage that failed for one reason."""

    stage: str
    reason: str
    rows: int


class Shortfall(Struct, frozen=True):
    """The failed rows of a stage, with the most frequent reasons and their counts."""

    stage: str
    failed: int
    total: int
    reasons: list[tuple[str, int]]

    @property
    def share(self) -> float:
        """The share of all rows that the stage should produce."""
        return self.failed / self.total

    @property
    def is_large(self) -> bool:
        """Whether so many rows failed that the dataset is probably not as intended; imported scores intend no text."""
        intended = sum(rows for reason, rows in self.reasons if reason == NO_TEXT)
        return (self.failed - intended) / self.total > MANY_FAILED

    def __str__(self) -> str:
        why = ", ".join(f"{reason} {rows:,}" for reason, rows in self.reasons)
        return f"{self.stage}: {self.failed:,} of {self.total:,} rows failed ({self.share:.1%}): {why}"


class RowCounts(Struct, frozen=True):
    """Counts of a run's rows by outcome."""

    stages: dict[str, Progress]
    failures: list[Failures]
    #: At the time of counting: the current stage, and the rows of its open jobs.
    stage: str
    open_rows: int

    def after(self, earlier: RowCounts) -> RowCounts:
        """Complete this tally with stages that only an earlier one counted."""
        kept = {name: counts for name, counts in earlier.stages.items() if name not in self.stages}
        failures = [failure for failure in earlier.failures if failure.stage in kept]
        return RowCounts(kept | self.stages, failures + self.failures, self.stage, self.open_rows)


def snapshot(session: Session, run: Run) -> Snapshot:
    """Take a snapshot of a run's current stage; the cost depends on the number of jobs, not of prompts."""
    mine = Job.run_id == run.id, Job.stage == run.stage
    counted = session.execute(
        select(Job.state, func.count(), func.sum(Job.n_prompts), func.min(Job.started_at))
        .where(*mine)
        .group_by(Job.state)
    ).all()
    at = session.scalars(select(now())).one()
    began = min((start for *_, start in counted if start is not None), default=at)
    held = _held_jobs(session, run, at)
    is_worked = run.state is RunState.RUNNING and bool(held)
    return Snapshot(
        at=at,
        state=run.state,
        stage=run.stage,
        error=run.error,
        began=run.created_at,
        stage_seconds=(at - began).total_seconds(),
        jobs={state: count for state, count, *_ in counted},
        open_rows=sum(int(rows) for state, _, rows, _ in counted if state in _OPEN),
        planned_rows=sum(int(rows) for state, _, rows, _ in counted if state is not JobState.CANCELLED),
        held=held,
        paces=_teacher_rates(session, run, at, max(began, at - RECENT)) if is_worked else [],
        troubles=_job_errors(session, run),
        waits=waits(session, run, at),
    )


def effective_state(state: RunState, holders: Collection[str], *, is_waiting: bool) -> str:
    """A run's state; a running run without a live holder of its jobs is waiting for a server, or stopped."""
    if state is not RunState.RUNNING or len(holders) > len(owner.dead(holders)):
        return state.value
    return "waiting" if is_waiting else "stopped"


def waiting_runs(session: Session) -> set[int]:
    """The ids of runs that are waiting for a server."""
    return set(session.scalars(select(Outage.run_id).where(Outage.retry_at > now())))


def waits(session: Session, run: Run, at: datetime) -> list[ServerWait]:
    """The servers that a run's jobs are waiting for."""
    if run.state is not RunState.RUNNING:
        return []
    is_open = and_(Job.run_id == Outage.run_id, Job.queue == Outage.queue, Job.state.in_(_OPEN))
    rows = session.execute(
        select(Outage.queue, Outage.error, Outage.since, Outage.retry_at, func.min(Teacher.name))
        .join(Job, is_open)
        .outerjoin(Teacher, Teacher.id == Job.teacher_id)
        .where(Outage.run_id == run.id)
        .group_by(Outage.queue, Outage.error, Outage.since, Outage.retry_at)
        .order_by(Outage.since, Outage.queue)
    )
    limit = load_config(run.config).run.outage_seconds
    return [
        ServerWait(
            model=teacher or queue,
            error=error,
            seconds=(at - since).total_seconds(),
            retry_seconds=max(0.0, (retry_at - at).total_seconds()),
            limit_seconds=limit,
        )
        for queue, error, since, retry_at, teacher in rows
    ]


def finished_rows(seen: Snapshot, counted: RowCounts) -> int:
    """Rows of the current stage that are done or failed: those counted, or more if jobs have ended since."""
    counts = counted.stages[seen.stage]
    known = counts.done + counts.failed
    if counted.stage != seen.stage:
        return known
    # Missing rows are in open jobs, which may be half done, except those in no job at the time of counting.
    in_no_job = max(0, counts.pending - counted.open_rows)
    return max(known, counts.total - seen.open_rows - in_no_job)


def rate(seen: Snapshot, pending: int) -> float | None:
    """Rows per second of the current stage: recent if teachers are generating, else since it began; None at first.

    pending: its rows that are still missing.
    """
    if seen.paces:
        return sum(pace.responses for pace in seen.paces)
    worked = seen.planned_rows - pending
    return worked / seen.stage_seconds if worked > 0 and seen.stage_seconds > 0 else None


def shortfalls(counted: RowCounts) -> list[Shortfall]:
    """The shortfall of each stage in which rows failed."""
    return [
        Shortfall(
            stage,
            counts.failed,
            counts.total,
            [(each.reason, each.rows) for each in counted.failures if each.stage == stage][:_MOST_REASONS],
        )
        for stage, counts in counted.stages.items()
        if counts.failed
    ]


def count_rows(session: Session, run: Run, *, known: Collection[str] = ()) -> RowCounts:
    """Count the rows of the run's stages by outcome and reason of failure.

    known: stages to leave out; completed stages do not change.
    """
    stages = pipeline.progress(session, run, known=known)
    failures = [
        Failures(name, why, rows)
        for name, counts in stages.items()
        if counts.failed and (select_failures := STAGES[name].failures)
        for why, rows in _by_reason(session, select_failures(run))
    ]
    counted = select(func.sum(Job.n_prompts)).where(Job.run_id == run.id, Job.stage == run.stage, Job.state.in_(_OPEN))
    return RowCounts(stages, failures, run.stage, int(session.scalars(counted).one() or 0))


def _held_jobs(session: Session, run: Run, at: datetime) -> list[HeldJob]:
    claim = and_(Event.job_id == Job.id, Event.fence == Job.fence, Event.to_state == JobState.RUNNING)
    rows = session.execute(
        select(Job, Teacher.name, Event.at)
        .outerjoin(Teacher, Teacher.id == Job.teacher_id)
        .outerjoin(Event, claim)
        .where(Job.run_id == run.id, Job.state == JobState.RUNNING)
        .order_by(Job.owner, Job.id)
    )
    return [
        HeldJob(
            worker=job.owner or "",
            job=job.id,
            model=teacher or job.queue,
            prompts=job.n_prompts,
            seconds=(at - (since or at)).total_seconds(),
            lease_seconds=((job.lease_until or at) - at).total_seconds(),
        )
        for job, teacher, since in rows
    ]


def _teacher_rates(session: Session, run: Run, at: datetime, since: datetime) -> list[TeacherRate]:
    """Rates by teacher in head order, without idle ones. An index finds the latest responses without reading all."""
    before = select(func.max(Response.id) - _MOST_RECENT).scalar_subquery()
    is_cut = select(func.min(Response.id)).scalar_subquery() <= before
    # If there are more, the time at which the first of these arrived, in any run.
    first = select(Response.created_at).where(is_cut, Response.id > before).order_by(Response.id).limit(1)
    began = max(since, session.scalars(first).first() or since)
    recent = (
        select(Response.teacher_id, Response.response_tokens)
        .join(Job, Job.id == Response.job_id)
        .where(
            Response.id > before,
            Response.created_at > since,
            Job.run_id == run.id,
            Job.stage == run.stage,
        )
        .subquery()
    )
    rows = session.execute(
        select(
            Teacher.name,
            func.count(),
            func.coalesce(func.sum(recent.c.response_tokens), 0),
        )
        .join(RunTeacher, and_(RunTeacher.teacher_id == recent.c.teacher_id, RunTeacher.run_id == run.id))
        .join(Teacher, Teacher.id == recent.c.teacher_id)
        .group_by(Teacher.name, RunTeacher.position)
        .order_by(RunTeacher.position)
    ).all()
    seconds = max((at - began).total_seconds(), 1.0)
    return [TeacherRate(name, count / seconds, int(tokens) / seconds) for name, count, tokens in rows]


def _job_errors(session: Session, run: Run) -> list[JobErrors]:
    rows = session.execute(
        select(Job.error, func.count())
        .where(Job.run_id == run.id, Job.stage == run.stage, Job.state.in_(_OPEN), Job.error.is_not(None))
        .group_by(Job.error)
        .order_by(func.count().desc())
        .limit(_MOST_ERRORS)
    )
    return [JobErrors(error or "", jobs) for error, jobs in rows]


def _by_reason(session: Session, failures: Select[Any]) -> list[tuple[str, int]]:
    failed = failures.subquery()
    why = reason(failed.c.failure).label("why")
    return [
        (word, rows)
        for word, rows in session.execute(select(why, func.count()).group_by(why).order_by(func.count().desc()))
    ]
