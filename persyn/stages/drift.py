"""Stop the use of a teacher whose responses became worse than its calibration responses predicted.

When the quality of all that a teacher's job wrote is known, it is added to the teacher's control chart, in the
transaction that ends the job that scored it. If that raises the alarm, the teacher's waiting jobs are cancelled there
too, and none is planned until the run is resumed; then another chart starts. Killed at any moment, all of that is done,
or nothing.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Any

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, and_, exists, false, func, select
from sqlalchemy.orm import Session, aliased

from persyn.config import load_config
from persyn.db import bulk, grid, notes
from persyn.db.catalog import Role, Run, RunPrompt, RunState, Teacher
from persyn.db.grid import Grid
from persyn.db.results import Assignment, Chart, ChartPoint, Response, Score
from persyn.db.work import Job, JobState
from persyn.errors import UsageError
from persyn.jobs import owner, queue
from persyn.jobs.queue import Claim, ModelJobs
from persyn.llm import quality
from persyn.method import control_chart
from persyn.method.control_chart import Design, Point
from persyn.method.strategies import STRATEGIES
from persyn.stages import verdict

#: The first word of the error of a job, and of a run, that stopped because a teacher became worse; a cause of a move to
#: another teacher.
DRIFT = "drift"


class Alarm(Struct, frozen=True):
    """A teacher that became worse than its calibration responses predicted."""

    teacher_id: int
    teacher: str
    chart: Design
    point: Point
    #: When the first of the responses that are worse were scored.
    since: datetime

    @property
    def says(self) -> str:
        """What was predicted and what came."""
        return (
            f"teacher {self.teacher} became worse: the mean quality of its last {self.point.rising:,} responses, "
            f"scored since {self.since:%Y-%m-%d %H:%M} UTC, is {self.point.mean:.3f}, and {self.chart.n:,} calibration "
            f"responses predicted {self.chart.predicted:.3f}, at least {self.chart.expected:.3f}"
        )

    @property
    def reason(self) -> str:
        """Why its jobs are cancelled."""
        return f"{DRIFT}: {self.says}"


def begin(session: Session, run: Run) -> None:
    """Start a chart of each teacher with a prediction that its responses can be held against.

    Each router of a run gives a teacher other prompts, and begins with another prediction; a teacher that was stopped
    remains so.
    """
    config = load_config(run.config)
    if config.generation.when_worse is None or STRATEGIES.require(config.strategy.kind, "strategy").grid == "all":
        return
    charts, since = select(Chart.id).where(Chart.run_id == run.id), notes.last_at(session, run, verdict.RECALIBRATED)
    if since is not None:
        charts = charts.where(Chart.created_at > since)
    if session.scalars(charts.limit(1)).first() is not None:
        return
    worse = {each.teacher_id for each in alarms(session, run)}
    cells = grid.read(session, run)
    is_chosen, is_alike = chosen(session, run, cells)
    known = cells.quality[~np.isnan(cells.quality)]
    if not is_alike or not len(known):
        return
    low, high = float(known.min()), float(known.max())
    if quality.may_be_verdict(config):  # all may have been right, or wrong
        low, high = min(low, 0.0), max(high, 1.0)
    for teacher_id, values, mine in zip(cells.teacher_ids.tolist(), cells.quality.T, is_chosen.T, strict=True):
        found = control_chart.design(values[mine & ~np.isnan(values)], low=low, high=high)
        if found is not None and teacher_id not in worse:
            _start(session, run, teacher_id, found)


def watch(session: Session, run: Run, scored: Claim) -> None:
    """Add what a job has scored to the charts, and stop the teachers that are worse than predicted.

    Call it under the lock on the run, in the transaction that completes the job.
    """
    when_worse = load_config(run.config).generation.when_worse
    if when_worse is None:
        return
    for job, chart in session.execute(_uncharted(run, scored)).all():
        qualities = _qualities(session, run, job)
        if qualities is None or not len(qualities):
            continue
        was = session.scalars(_points(chart.id).order_by(ChartPoint.id.desc()).limit(1)).first()
        if was is not None and was.is_alarm:
            continue
        point = control_chart.add(read(chart, Design), Point() if was is None else read(was, Point), qualities)
        row = {"chart_id": chart.id, "job_id": job.id, "is_alarm": point.is_alarm, **structs.asdict(point)}
        bulk.insert_new(session, ChartPoint, [row])
        if point.is_alarm:
            _raise_alarm(session, run, chart.teacher_id, is_stop=when_worse == "stop")


def is_stopped(run: Run, teacher_id: Any) -> ColumnElement[bool]:
    """Whether a run has stopped using a teacher."""
    if load_config(run.config).generation.when_worse != "stop":
        return false()
    return exists(_alarms(run).where(Chart.teacher_id == teacher_id))


def stopped(session: Session, run: Run) -> list[Alarm]:
    """The teachers that a run has stopped using, in the order of their alarms."""
    return alarms(session, run) if load_config(run.config).generation.when_worse == "stop" else []


def alarms(session: Session, run: Run) -> list[Alarm]:
    """The teachers that became worse, and were not asked again since, in the order of their alarms."""
    found = _alarms(run).join(Teacher, Teacher.id == Chart.teacher_id).order_by(ChartPoint.id)
    rows: list[Any] = list(session.execute(found.with_only_columns(Chart, ChartPoint, Teacher.name)))
    return [
        Alarm(chart.teacher_id, name, read(chart, Design), read(last, Point), _since(session, last))
        for chart, last, name in rows
    ]


def require(session: Session, run: Run, wanted: Select[Any]) -> None:
    """Raise `UsageError` if responses are missing because their teachers were stopped.

    wanted: selects the responses that the run should have, as `lookup.with_rows`.
    """
    owed = []
    for each in stopped(session, run):
        missing = wanted.where(Assignment.teacher_id == each.teacher_id, Response.id.is_(None))
        if count := session.scalars(missing.with_only_columns(func.count())).one():
            owed.append(f"{each.says}; {count:,} of its responses are missing")
    if owed:
        raise UsageError(
            f"{DRIFT}: {'. '.join(owed)}. Find out what changed, such as the model behind its server, or its template, "
            f"and mend it: 'persyn run resume {run.name}' asks for the rest"
        )


def resume(session: Session, run: Run, *, actor: str) -> None:
    """Ask stopped teachers again if the run has failed for them; otherwise their jobs that were requeued wait again."""
    found = stopped(session, run)
    if run.state is RunState.FAILED and f" {DRIFT}: " in (run.error or ""):
        for each in found:
            _start(session, run, each.teacher_id, each.chart)
        notes.note(session, run, {"asked again": [each.teacher for each in found]}, actor=actor)
        return
    for each in found:
        _halt(session, run, each, actor=actor)


def chosen(session: Session, run: Run, cells: Grid) -> tuple[NDArray[np.bool_], bool]:
    """(P, T) the calibration prompts for which a router that had not seen them would choose the teacher.

    Where no router decides alone, all of them; and then, whether teachers are given prompts whatever these say.
    """
    everywhere = np.ones(cells.quality.shape, dtype=np.bool_)
    strategy, decided = load_config(run.config).strategy, verdict.decision(session, run)
    if decided is not None and not decided.routes and not strategy.is_limited:
        return everywhere, True
    if not strategy.is_limited:
        with suppress(UsageError):
            scores = verdict.unseen_scores(session, run, cells)
            known = np.flatnonzero(~np.isnan(scores).any(axis=1))
            found = np.zeros(cells.quality.shape, dtype=np.bool_)
            found[known, np.argmax(scores[known], axis=1)] = True
            return found, True
    kind = STRATEGIES.get(strategy.kind)
    return everywhere, kind is not None and kind.decided_by == "policy" and not strategy.is_limited


def _start(session: Session, run: Run, teacher_id: int, found: Design) -> None:
    bulk.insert_new(session, Chart, [{"run_id": run.id, "teacher_id": teacher_id, **structs.asdict(found)}])


def read(row: Any, kind: Any) -> Any:
    """A chart's `Design` from its row, or a `Point` from that of a point."""
    return kind(**{field.name: getattr(row, field.name) for field in structs.fields(kind)})


def _points(chart_id: Any) -> Select[Any]:
    return select(ChartPoint).where(ChartPoint.chart_id == chart_id)


def _uncharted(run: Run, scored: Claim) -> Select[Job, Chart]:
    """Select the jobs that wrote what a job has scored, and their teachers' charts; only those begun since these."""
    wrote = scored.follows_job_id
    of_these = select(Response.job_id).join(Score, Score.response_id == Response.id).where(Score.job_id == scored.id)
    later = aliased(Chart)
    return (
        select(Job, Chart)
        .join(Chart, and_(Chart.run_id == run.id, Chart.teacher_id == Job.teacher_id))
        .where(Job.run_id == run.id, Job.stage == scored.stage, Job.state == JobState.DONE)
        .where(Job.id == wrote if wrote is not None else Job.id.in_(of_these), Job.started_at >= Chart.created_at)
        .where(~exists().where(later.run_id == run.id, later.teacher_id == Chart.teacher_id, later.id > Chart.id))
        .where(~exists().where(ChartPoint.job_id == Job.id))
        .order_by(Job.id)
    )


def _qualities(session: Session, run: Run, job: Job) -> NDArray[np.float64] | None:
    """The qualities of a job's responses that the prediction is about; None while one of them is not known.

    These are the first responses to prompts that the run was started with, by the teacher that was chosen first. A
    choice among responses, or prompts of another kind, would say something else about the teacher.
    """
    is_quality = and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id)
    rows = session.execute(
        select(Score.value, Score.response_id)
        .select_from(Assignment)
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == Assignment.prompt_id))
        .join(Response, and_(Response.prompt_id == Assignment.prompt_id, Response.teacher_id == Assignment.teacher_id))
        .outerjoin(Score, is_quality)
        .where(Assignment.run_id == run.id, Assignment.teacher_id == job.teacher_id, Assignment.choice == 1)
        .where(Assignment.prompt_id.between(job.first_prompt_id, job.last_prompt_id))
        .where(RunPrompt.role == Role.TARGET, RunPrompt.extension == 0)
        .where(Response.job_id == job.id, Response.sample == 0, Response.text.is_not(None))
    ).all()
    if any(row.response_id is None for row in rows):
        return None
    return np.array([row.value for row in rows if row.value is not None], dtype=np.float64)


def _raise_alarm(session: Session, run: Run, teacher_id: int, *, is_stop: bool) -> None:
    """Record that a teacher is worse than predicted and, where the run stops its use, cancel its waiting jobs."""
    found = next(each for each in alarms(session, run) if each.teacher_id == teacher_id)
    facts = {"teacher": found.teacher, "predicted": found.chart.predicted, "calibration": found.chart.n}
    facts |= {"mean": found.point.mean, "responses": found.point.rising, "of": found.point.responses, "stops": is_stop}
    notes.note(session, run, {DRIFT: facts}, actor=owner.actor())
    if is_stop:
        _halt(session, run, found, actor=owner.actor())


def _halt(session: Session, run: Run, found: Alarm, *, actor: str) -> None:
    """Cancel a teacher's waiting jobs. What workers hold is finished: it may be paid for already."""
    jobs = ModelJobs(run.stage, found.teacher_id, None)
    queue.halt_waiting(session, run.id, jobs, found.reason, owner=actor)


def _alarms(run: Run) -> Select[Any]:
    """Select the alarms of charts after which no other was started."""
    later = aliased(Chart)
    is_last = ~exists().where(later.run_id == run.id, later.teacher_id == Chart.teacher_id, later.id > Chart.id)
    return (
        select(ChartPoint.id)
        .join(Chart, Chart.id == ChartPoint.chart_id)
        .where(Chart.run_id == run.id, ChartPoint.is_alarm, is_last)
    )


def _since(session: Session, alarm: ChartPoint) -> datetime:
    """When the first of the responses that are worse were scored."""
    began = select(func.min(ChartPoint.created_at)).where(ChartPoint.chart_id == alarm.chart_id)
    return session.scalars(began.where(ChartPoint.responses > alarm.responses - alarm.rising)).one()
