"""What came out of a run, in figures: read from the store, computed from raw scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, and_, case, func, select
from sqlalchemy.orm import Session

from persyn import pipeline, rewards
from persyn.config import thaw
from persyn.db import grid
from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.results import Assignment, Response, Router
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, Load

#: A teacher with a larger share of the routed prompts has them all; of fewer prompts nothing is said.
NEARLY_ALL, FEW = 0.9, 50


class StageFacts(Struct, frozen=True):
    """How a stage went. total = done + failed + pending."""

    stage: str
    total: int
    done: int
    failed: int
    pending: int
    #: From the first job's claim to the last one's end; a pause in between counts.
    seconds: float | None


class TeacherFacts(Struct, frozen=True):
    """What one teacher was given and how it did on the calibration grid; None where nothing is scored yet."""

    teacher: str
    #: Prompts of the run assigned to it.
    assigned: int
    #: Raw mean over the grid, in the quality scorer's unit.
    quality: float | None
    #: Raw mean over the grid, nats per token.
    learnability: float | None
    #: Mean combined reward over the grid, 0 to 1 for min-max.
    reward: float | None
    #: Tokens it wrote for the run, and US dollars for them and for what it read; None where a price is not known.
    tokens: int
    cost: float | None = None


class WorkerFacts(Struct, frozen=True):
    """What one worker process did for the run, by the events of its jobs; seconds by the database's clock."""

    worker: str
    #: Claims; a job that was given back and claimed again counts again.
    claims: int
    #: Models it loaded for the run, and how long that took.
    loads: int
    load_seconds: float
    #: With at least one job in hand, loading included.
    work_seconds: float
    #: Without any, between its first job and its last.
    idle_seconds: float


class Facts(Struct, frozen=True):
    """A run in figures."""

    name: str
    state: str
    stage: str
    error: str | None
    prompts: int
    stages: list[StageFacts]
    teachers: list[TeacherFacts]
    workers: list[WorkerFacts]
    #: The router on the hold-out prompts, beside the static and the random baseline; empty before it is fitted.
    router: dict[str, Any]
    #: A teacher to whom the router gave nearly all prompts, if there is one.
    collapsed: str | None
    #: Response tokens written for the run, and what all teachers answering all prompts would have written.
    tokens: int
    tokens_generate_all: int | None
    #: The same in US dollars; None unless all teachers have prices, and their token counts are known.
    cost: float | None = None
    cost_generate_all: float | None = None


@dataclass(frozen=True, slots=True)
class _Spent:
    """On one teacher; dollars are None where they are not known."""

    tokens: int
    dollars: float | None


_NOTHING = _Spent(0, None)


def facts(session: Session, run: Run) -> Facts:
    """Gather everything; cheap enough to be asked while the run goes on."""
    cells = grid.read(session, run)
    config = thaw(run.config)
    combined = rewards.combine(cells.quality, cells.learnability, alpha=config.run.alpha, how=config.run.normalise)
    n_prompts = session.scalars(select(func.count()).where(RunPrompt.run_id == run.id)).one()
    spent = _spent(session, run)
    all_tokens, all_dollars = _generate_all(session, run, n_prompts)
    router = session.get(Router, run.router_id) if run.router_id is not None else None
    return Facts(
        name=run.name,
        state=run.state,
        stage=run.stage,
        error=run.error,
        prompts=n_prompts,
        stages=_stages(session, run),
        teachers=_teachers(session, run, cells, combined, spent),
        workers=_workers(session, run),
        router=router.metrics if router is not None else {},
        collapsed=_collapsed(session, run),
        tokens=sum(one.tokens for one in spent.values()),
        tokens_generate_all=all_tokens,
        cost=_sum([one.dollars for one in spent.values()]),
        cost_generate_all=all_dollars,
    )


def dollars(amount: float) -> str:
    """An amount in cents; a small one in two digits that say something."""
    return f"${amount:,.2f}" if amount >= 0.1 or not amount else f"${amount:.2g}"


def _stages(session: Session, run: Run) -> list[StageFacts]:
    spans: dict[str, tuple[datetime | None, datetime | None]] = {
        row.stage: (row.began, row.ended)
        for row in session.execute(
            select(Job.stage, func.min(Job.started_at).label("began"), func.max(Job.finished_at).label("ended"))
            .where(Job.run_id == run.id)
            .group_by(Job.stage)
        )
    }
    found = []
    for name, counts in pipeline.progress(session, run).items():
        began, ended = spans.get(name, (None, None))
        seconds = (ended - began).total_seconds() if began and ended else None
        found.append(StageFacts(name, counts.total, counts.done, counts.failed, counts.pending, seconds))
    return found


def _teachers(
    session: Session, run: Run, cells: grid.Grid, combined: NDArray[np.float64], spent: dict[int, _Spent]
) -> list[TeacherFacts]:
    assigned: dict[int, int] = dict(
        session.execute(
            select(Assignment.teacher_id, func.count())
            .where(Assignment.run_id == run.id)
            .group_by(Assignment.teacher_id)
        ).all()
    )
    teachers = session.execute(
        select(Teacher.id, Teacher.name)
        .join(RunTeacher)
        .where(RunTeacher.run_id == run.id)
        .order_by(RunTeacher.position)
    ).all()
    return [
        TeacherFacts(
            teacher=teacher.name,
            assigned=assigned.get(teacher.id, 0),
            quality=_mean(cells.quality[:, column]),
            learnability=_mean(cells.learnability[:, column]),
            reward=_mean(combined[:, column]),
            tokens=spent.get(teacher.id, _NOTHING).tokens,
            cost=spent.get(teacher.id, _NOTHING).dollars,
        )
        for column, teacher in enumerate(teachers)
    ]


def _collapsed(session: Session, run: Run) -> str | None:
    routed = session.execute(
        select(Teacher.name, func.count())
        .join(Assignment, Assignment.teacher_id == Teacher.id)
        .where(Assignment.run_id == run.id, Assignment.reason == "router")
        .group_by(Teacher.id, Teacher.name)
    ).all()
    total = sum(count for _, count in routed)
    return next((name for name, count in routed if total >= FEW and count > NEARLY_ALL * total), None)


@dataclass(slots=True)
class Shift:
    """One worker's time, as far as events tell it."""

    began: datetime
    ended: datetime
    claims: int = 0
    in_hand: set[int] = field(default_factory=set)
    work_seconds: float = 0.0

    def claimed(self, job_id: int, at: datetime) -> None:
        """A job begins; the time since the one before was idle if none was in hand."""
        self.pass_to(at)
        self.claims += 1
        self.in_hand.add(job_id)

    def ended_job(self, job_id: int, at: datetime) -> None:
        """A job is over, or taken away."""
        self.pass_to(at)
        self.in_hand.discard(job_id)

    def pass_to(self, at: datetime) -> None:
        """Time goes by, with what is in hand; backwards it goes not."""
        at = max(at, self.ended)
        if self.in_hand:
            self.work_seconds += (at - self.ended).total_seconds()
        self.ended = at


def shifts(session: Session, which: ColumnElement[bool]) -> dict[str, Shift]:
    """Each worker's time with the jobs of such events: each is followed from claim to end, as things happened."""
    found: dict[str, Shift] = {}
    holders: dict[int, str] = {}
    steps = select(Event.at, Event.actor, Event.job_id, Event.to_state, Event.detail)
    steps = steps.where(which, Event.job_id.is_not(None)).order_by(Event.id)
    for at, actor, job_id, state, detail in session.execute(steps, execution_options={"yield_per": 1000}):
        if job_id in holders:
            # A job that was taken back was worked until its worker was last heard of.
            silent = timedelta(seconds=detail.get("silent_seconds") or 0.0)
            found[holders.pop(job_id)].ended_job(job_id, at - silent)
        if state == JobState.RUNNING:
            found.setdefault(actor, Shift(at, at)).claimed(job_id, at)
            holders[job_id] = actor
    at = session.scalars(select(now())).one()
    for holder in set(holders.values()):
        found[holder].pass_to(at)
    return found


def _workers(session: Session, run: Run) -> list[WorkerFacts]:
    loads: dict[str, tuple[int, float]] = {
        owner: (count, seconds)
        for owner, count, seconds in session.execute(
            select(Load.owner, func.count(), func.sum(Load.seconds)).where(Load.run_id == run.id).group_by(Load.owner)
        )
    }
    return [
        WorkerFacts(
            worker=worker,
            claims=shift.claims,
            loads=loads.get(worker, (0, 0.0))[0],
            load_seconds=loads.get(worker, (0, 0.0))[1],
            work_seconds=shift.work_seconds,
            idle_seconds=max(0.0, (shift.ended - shift.began).total_seconds() - shift.work_seconds),
        )
        for worker, shift in sorted(shifts(session, Event.run_id == run.id).items(), key=lambda item: item[1].began)
    ]


def priced(prompt_tokens: Any, response_tokens: Any, teacher: Any) -> Any:
    """US dollars at a teacher's prices, of numbers or of columns."""
    return (prompt_tokens * teacher.price_in + response_tokens * teacher.price_out) / 1e6


#: Of one response; null without a price or a count.
_DOLLARS = priced(Response.prompt_tokens, Response.response_tokens, Teacher)


def _spent(session: Session, run: Run) -> dict[int, _Spent]:
    """What each teacher wrote of what the run rests on: the grid's responses and the assigned prompts'."""
    in_grid = RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT))
    assigned = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    rows = session.execute(
        select(
            Response.teacher_id,
            func.sum(Response.response_tokens).label("tokens"),
            func.sum(_DOLLARS).label("dollars"),
            (func.count(Response.text) - func.count(case((Response.text.is_not(None), _DOLLARS)))).label("unknown"),
        )
        .select_from(RunPrompt)
        .join(Response, and_(Response.prompt_id == RunPrompt.prompt_id, Response.sample == 0))
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .join(Teacher, Teacher.id == Response.teacher_id)
        .outerjoin(Assignment, assigned)
        .where(RunPrompt.run_id == run.id, in_grid | (Assignment.teacher_id == Response.teacher_id))
        .group_by(Response.teacher_id)
    )
    return {row.teacher_id: _Spent(int(row.tokens or 0), None if row.unknown else row.dollars) for row in rows}


def _generate_all(session: Session, run: Run, n_prompts: int) -> tuple[int | None, float | None]:
    """Tokens and dollars: every teacher's mean response on the grid, times all prompts.

    A teacher without a count leaves the tokens unknown, one without a price the dollars; one that only failed
    would have written nothing.
    """
    of_grid = (
        select(Response.teacher_id, Response.text, Response.response_tokens, _DOLLARS.label("dollars"))
        .join(RunPrompt, and_(RunPrompt.prompt_id == Response.prompt_id, RunPrompt.run_id == run.id))
        .join(Teacher, Teacher.id == Response.teacher_id)
        .where(Response.sample == 0, RunPrompt.role != Role.TARGET)
        .subquery()
    )
    means = session.execute(
        select(
            func.avg(of_grid.c.response_tokens).label("tokens"),
            func.avg(of_grid.c.dollars).label("dollars"),
            (func.count(of_grid.c.teacher_id) > func.count(of_grid.c.text)).label("has_failed"),
            func.count(of_grid.c.text).label("texts"),
        )
        .select_from(RunTeacher)
        .outerjoin(of_grid, of_grid.c.teacher_id == RunTeacher.teacher_id)
        .where(RunTeacher.run_id == run.id)
        .group_by(RunTeacher.teacher_id)
    ).all()
    known = [row for row in means if row.texts or not row.has_failed]
    tokens, dollars = _sum([row.tokens for row in known]), _sum([row.dollars for row in known])
    if tokens is None:
        return None, None
    return round(float(tokens) * n_prompts), None if dollars is None else dollars * n_prompts


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _mean(column: NDArray[np.float64]) -> float | None:
    return float(np.nanmean(column)) if not np.isnan(column).all() else None
