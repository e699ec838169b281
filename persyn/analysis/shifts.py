"""Reconstruct from events when workers had jobs in hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from persyn.db.time import now
from persyn.db.work import Event, Job, JobState


@dataclass(slots=True)
class Shift:
    """One worker's time, reconstructed from events."""

    began: datetime
    ended: datetime
    claims: int = 0
    #: {job id: stage} of the jobs in hand.
    in_hand: dict[int, str] = field(default_factory=dict)
    work_seconds: float = 0.0
    #: Time with at least one job of the stage in hand.
    stage_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def claimed(self, job_id: int, stage: str, at: datetime) -> None:
        """Start a job; the time since the previous event was idle if no job was in hand."""
        self.pass_to(at)
        self.claims += 1
        self.in_hand[job_id] = stage

    def ended_job(self, job_id: int, at: datetime) -> None:
        """End a job, or take it away."""
        self.pass_to(at)
        self.in_hand.pop(job_id, None)

    def pass_to(self, at: datetime) -> None:
        """Account for the time until `at`; an earlier `at` has no effect, as time never moves backwards."""
        at = max(at, self.ended)
        seconds = (at - self.ended).total_seconds()
        if self.in_hand:
            self.work_seconds += seconds
        for stage in set(self.in_hand.values()):
            self.stage_seconds[stage] += seconds
        self.ended = at


def of_jobs(session: Session, which: ColumnElement[bool]) -> dict[str, Shift]:
    """Reconstruct each worker's time from job events, following each job from claim to end in event order."""
    found: dict[str, Shift] = {}
    holders: dict[int, str] = {}
    steps = select(Event.at, Event.actor, Event.job_id, Job.stage, Event.to_state, Event.detail)
    steps = steps.join(Job, Job.id == Event.job_id).where(which).order_by(Event.id)
    for at, actor, job_id, stage, state, detail in session.execute(steps, execution_options={"yield_per": 1000}):
        if job_id in holders:
            # A job taken from a lost worker counts until the worker's last sign of life.
            silent = timedelta(seconds=detail.get("silent_seconds") or 0.0)
            found[holders.pop(job_id)].ended_job(job_id, at - silent)
        if state == JobState.RUNNING:
            found.setdefault(actor, Shift(at, at)).claimed(job_id, stage, at)
            holders[job_id] = actor
    at = session.scalars(select(now())).one()
    for holder in set(holders.values()):
        found[holder].pass_to(at)
    return found
