"""What came out of a run, in figures: read from the store, computed from raw scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.orm import Session

from persyn.config import thaw
from persyn.dataset.verdicts import known_wrong
from persyn.db import grid
from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.results import Assignment, Response, Router
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, Load
from persyn.method import rewards
from persyn.runs import pipeline

#: A teacher with a larger share of the routed prompts has them all; of fewer prompts nothing is said.
NEARLY_ALL, FEW = 0.9, 50
#: A teacher of whose responses a larger share is cut off is named.
MUCH = 0.05


class StageFacts(Struct, frozen=True):
    """How a stage went. total = done + failed + pending."""

    stage: str
    total: int
    done: int
    failed: int
    pending: int
    #: Elapsed from the first job's claim to the last one's end; a pause in between counts.
    seconds: float | None
    #: During which workers held a job of the stage, summed over workers; model loads count, pauses do not.
    work_seconds: float | None = None


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
    #: Tokens that jobs of this run had it write, and US dollars for them and for what it read; None where a price or a
    #: count is not known.
    tokens: int
    cost: float | None = None
    #: Tokens of responses that the run uses and did not ask for: imported, or written for another run.
    reused_tokens: int = 0
    #: Share of its responses for the run that are cut off at max_tokens; None where that is not known of any.
    truncated: float | None = None


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


class Spending(Struct, frozen=True):
    """What a run's own jobs generated: response tokens, and US dollars where every price and count is known."""

    tokens: int
    dollars: float | None


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
    #: A teacher to whom the router gave nearly all prompts, though others are the best for some of the hold-out.
    collapsed: str | None
    #: Response tokens that jobs of this run generated, and what all teachers answering all prompts would have written.
    tokens: int
    tokens_generate_all: int | None
    #: The same in US dollars; None unless all teachers have prices, and their token counts are known.
    cost: float | None = None
    cost_generate_all: float | None = None
    #: Response tokens that the run uses and did not ask for: imported, or written for another run.
    reused_tokens: int = 0
    #: Assigned responses that are known to be wrong; None where the run's quality is no verdict.
    wrong: int | None = None


@dataclass(frozen=True, slots=True)
class _Spent:
    """On one teacher; dollars are None where they are not known."""

    tokens: int
    dollars: float | None
    reused_tokens: int
    #: Share of its responses that are cut off, whoever asked for them.
    truncated: float | None


_NOTHING = _Spent(0, None, 0, None)


def facts(session: Session, run: Run) -> Facts:
    """Gather everything; cheap enough to be asked while the run goes on."""
    cells = grid.read(session, run)
    config = thaw(run.config)
    combined = rewards.combine(cells.quality, cells.learnability, alpha=config.run.alpha, how=config.run.normalise)
    n_prompts = session.scalars(select(func.count()).where(RunPrompt.run_id == run.id)).one()
    spent = _spent(session, run)
    all_tokens, all_dollars = _generate_all(session, run, n_prompts)
    router = session.get(Router, run.router_id) if run.router_id is not None else None
    metrics = router.metrics if router is not None else {}
    worked = shifts(session, Event.run_id == run.id)
    return Facts(
        name=run.name,
        state=run.state,
        stage=run.stage,
        error=run.error,
        prompts=n_prompts,
        stages=_stages(session, run, worked.values()),
        teachers=_teachers(session, run, cells, combined, spent),
        workers=_workers(session, run, worked),
        router=metrics,
        collapsed=_collapsed(session, run, metrics),
        tokens=sum(one.tokens for one in spent.values()),
        tokens_generate_all=all_tokens,
        cost=_sum([one.dollars for one in spent.values()]),
        cost_generate_all=all_dollars,
        reused_tokens=sum(one.reused_tokens for one in spent.values()),
        wrong=known_wrong(session, run),
    )


def dollars(amount: float) -> str:
    """An amount in cents; a small one in two digits that say something."""
    return f"${amount:,.2f}" if amount >= 0.1 or not amount else f"${amount:.2g}"


def _stages(session: Session, run: Run, worked: Collection[Shift]) -> list[StageFacts]:
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
        work_seconds = sum(shift.stage_seconds[name] for shift in worked) if began else None
        found.append(StageFacts(name, counts.total, counts.done, counts.failed, counts.pending, seconds, work_seconds))
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
            reused_tokens=spent.get(teacher.id, _NOTHING).reused_tokens,
            truncated=spent.get(teacher.id, _NOTHING).truncated,
        )
        for column, teacher in enumerate(teachers)
    ]


def _collapsed(session: Session, run: Run, metrics: dict[str, Any]) -> str | None:
    hit1 = metrics.get("router", {}).get("hit1")
    if hit1 is not None and hit1 > NEARLY_ALL:
        return None  # one teacher is the best nearly everywhere, and the router is right to say so
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
    #: The stage of each job in hand, by the job's id.
    in_hand: dict[int, str] = field(default_factory=dict)
    work_seconds: float = 0.0
    #: With at least one job of the stage in hand.
    stage_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def claimed(self, job_id: int, stage: str, at: datetime) -> None:
        """A job begins; the time since the one before was idle if none was in hand."""
        self.pass_to(at)
        self.claims += 1
        self.in_hand[job_id] = stage

    def ended_job(self, job_id: int, at: datetime) -> None:
        """A job is over, or taken away."""
        self.pass_to(at)
        self.in_hand.pop(job_id, None)

    def pass_to(self, at: datetime) -> None:
        """Count the time until `at` with what is in hand; an earlier `at` changes nothing."""
        at = max(at, self.ended)
        seconds = (at - self.ended).total_seconds()
        if self.in_hand:
            self.work_seconds += seconds
        for stage in set(self.in_hand.values()):
            self.stage_seconds[stage] += seconds
        self.ended = at


def shifts(session: Session, which: ColumnElement[bool]) -> dict[str, Shift]:
    """Each worker's time with the jobs of such events: each is followed from claim to end, as things happened."""
    found: dict[str, Shift] = {}
    holders: dict[int, str] = {}
    steps = select(Event.at, Event.actor, Event.job_id, Job.stage, Event.to_state, Event.detail)
    steps = steps.join(Job, Job.id == Event.job_id).where(which).order_by(Event.id)
    for at, actor, job_id, stage, state, detail in session.execute(steps, execution_options={"yield_per": 1000}):
        if job_id in holders:
            # A job that was taken back was worked until its worker was last heard of.
            silent = timedelta(seconds=detail.get("silent_seconds") or 0.0)
            found[holders.pop(job_id)].ended_job(job_id, at - silent)
        if state == JobState.RUNNING:
            found.setdefault(actor, Shift(at, at)).claimed(job_id, stage, at)
            holders[job_id] = actor
    at = session.scalars(select(now())).one()
    for holder in set(holders.values()):
        found[holder].pass_to(at)
    return found


def _workers(session: Session, run: Run, worked: Mapping[str, Shift]) -> list[WorkerFacts]:
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
        for worker, shift in sorted(worked.items(), key=lambda item: item[1].began)
    ]


def priced(prompt_tokens: Any, response_tokens: Any, teacher: Any) -> Any:
    """US dollars at a teacher's prices, of numbers or of columns."""
    return (prompt_tokens * teacher.price_in + response_tokens * teacher.price_out) / 1e6


#: Of one response; null without a price or a count.
_DOLLARS = priced(Response.prompt_tokens, Response.response_tokens, Teacher)


def _spent(session: Session, run: Run) -> dict[int, _Spent]:
    """Of the responses that the run uses (the grid's and the assigned prompts'): what each teacher wrote for this run,
    and what was already in the store.
    """
    in_grid = RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT))
    assigned = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    is_own = Job.run_id == run.id
    own_text = case((and_(is_own, Response.text.is_not(None)), Response.id))
    rows = session.execute(
        select(
            Response.teacher_id,
            func.sum(case((is_own, Response.response_tokens))).label("tokens"),
            func.sum(case((is_own, _DOLLARS))).label("dollars"),
            (func.count(own_text) - func.count(case((own_text.is_not(None), _DOLLARS)))).label("unknown"),
            func.sum(case((or_(Job.id.is_(None), ~is_own), Response.response_tokens))).label("reused"),
            func.count(case((Response.finish_reason == "length", 1))).label("truncated"),
            func.count(case((Response.text.is_not(None), Response.finish_reason))).label("finished"),
        )
        .select_from(RunPrompt)
        .join(Response, and_(Response.prompt_id == RunPrompt.prompt_id, Response.sample == 0))
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .join(Teacher, Teacher.id == Response.teacher_id)
        .outerjoin(Job, Job.id == Response.job_id)
        .outerjoin(Assignment, assigned)
        .where(RunPrompt.run_id == run.id, in_grid | (Assignment.teacher_id == Response.teacher_id))
        .group_by(Response.teacher_id)
    )
    return {
        row.teacher_id: _Spent(
            int(row.tokens or 0),
            None if row.unknown else row.dollars or 0.0,
            int(row.reused or 0),
            row.truncated / row.finished if row.finished else None,
        )
        for row in rows
    }


def spending(session: Session) -> dict[str, Spending]:
    """What each run generated itself, by its name; takes as long as responses are many."""
    rows = session.execute(
        select(
            Run.name,
            func.sum(Response.response_tokens),
            func.sum(_DOLLARS),
            func.count(Response.text) - func.count(case((Response.text.is_not(None), _DOLLARS))),
        )
        .join(Job, Job.run_id == Run.id)
        .join(Response, Response.job_id == Job.id)
        .join(Teacher, Teacher.id == Response.teacher_id)
        .group_by(Run.name)
    )
    return {name: Spending(int(tokens or 0), None if unknown else dollars) for name, tokens, dollars, unknown in rows}


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
