"""Check the consistency of a run in the store: counts, responses, and the history of each job.

Every rule is a query that selects violations, so only findings are read, however large the run. The rules also hold at
any moment of a running run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from sqlalchemy import ColumnElement, Select, and_, false, func, or_, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run, RunPrompt, RunState
from persyn.db.results import Assignment, Fallback, Response, Score, answers_assignment, is_candidate
from persyn.db.work import Event, Job, JobState
from persyn.runs import pipeline
from persyn.stages import checking
from persyn.stages.fallback import USED_UP
from persyn.stages.registry import STAGES

_AT_ONCE = 1000


class Violation(Struct, frozen=True):
    """An inconsistency.

    rule:  the violated rule.
    about: the stage, job or prompt.
    found: the state found.
    """

    rule: str
    about: str
    found: str


def audit(session: Session, run: Run) -> Iterator[Violation]:
    """Check a run within one snapshot, rule by rule; yield each violation as it is found."""
    yield from _counts(session, run)
    yield from _owed(session, run)
    yield from _kept(session, run)
    yield from _choices(session, run)
    yield from _checked(session, run)
    yield from _duplicates(session, run)
    yield from _strays(session, run)
    yield from _leases(session, run)
    yield from _transitions(session, run)
    yield from _ends(session, run)


def _counts(session: Session, run: Run) -> Iterator[Violation]:
    """Each stage's rows, counted independently, equal done + failed + pending; completed stages have none pending."""
    for stage, counts in pipeline.progress(session, run).items():
        sums = f"{counts.done} done + {counts.failed} failed + {counts.pending} pending"
        expected = STAGES[stage].expected(session, run)
        if expected != counts.total:
            yield Violation("counts", f"stage {stage}", f"expected {expected} rows, found {sums}")
        if counts.pending and (stage != run.stage or run.state is RunState.DONE):
            yield Violation("counts", f"stage {stage}", f"it ended with {sums}")


def _owed(session: Session, run: Run) -> Iterator[Violation]:
    """In a finished run every assigned prompt has a response or a failure, and no job is open."""
    if run.state is not RunState.DONE:
        return
    missing = (
        select(Assignment.prompt_id, Assignment.teacher_id)
        .outerjoin(Response, answers_assignment())
        .where(Assignment.run_id == run.id, Response.id.is_(None), ~Assignment.rejected)
        .order_by(Assignment.prompt_id)
    )
    for row in _stream(session, missing):
        yield Violation("response", f"prompt {row.prompt_id}", f"teacher {row.teacher_id} has no response to it")
    is_open = Job.state.in_((JobState.QUEUED, JobState.RUNNING))
    for job in _stream(session, select(Job.id, Job.state).where(Job.run_id == run.id, is_open)):
        yield Violation("response", f"job {job.id}", f"the run is done, but the job is {job.state}")


def _kept(session: Session, run: Run) -> Iterator[Violation]:
    """Where only correct responses are kept, the kept one is correct, and a rejected prompt has none that is."""
    if (generation := load_config(run.config).generation).keep != "correct":
        return
    is_right = and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id, Score.value >= 1)
    wrong = (
        select(Assignment.prompt_id, Response.sample, Assignment.rejected)
        .join(Response, and_(is_candidate(), Response.sample < generation.samples))
        .outerjoin(Score, is_right)
        .where(Assignment.run_id == run.id, Response.text.is_not(None))
        .where(
            or_(
                and_(Response.sample == Assignment.sample, Score.value.is_(None)),
                and_(Assignment.rejected, Score.value.is_not(None)),
            )
        )
        .order_by(Assignment.prompt_id)
    )
    for row in _stream(session, wrong):
        found = (
            f"it is rejected, but sample {row.sample} is" if row.rejected else f"sample {row.sample} is kept, but not"
        )
        yield Violation("kept", f"prompt {row.prompt_id}", f"{found} correct")


def _choices(session: Session, run: Run) -> Iterator[Violation]:
    """Each earlier choice of a prompt is recorded, and no other one, unless the prompt returned to one of them."""
    if load_config(run.config).fallback is None:
        return
    n_left = func.count(Fallback.choice)
    has_returned = and_(Assignment.reason == USED_UP, n_left >= Assignment.choice)
    wrong = (
        select(Assignment.prompt_id, Assignment.choice, n_left.label("left"))
        .outerjoin(Fallback, and_(Fallback.run_id == run.id, Fallback.prompt_id == Assignment.prompt_id))
        .where(Assignment.run_id == run.id)
        .group_by(Assignment.prompt_id, Assignment.choice, Assignment.reason)
        .having(~or_(n_left == Assignment.choice - 1, has_returned))
        .order_by(Assignment.prompt_id)
    )
    for row in _stream(session, wrong):
        found = f"it has choice {row.choice}, and {row.left} choices are recorded as not used"
        yield Violation("choice", f"prompt {row.prompt_id}", found)


def _checked(session: Session, run: Run) -> Iterator[Violation]:
    """Where responses are scored as they come, a run that is done has all of their scores."""
    if not load_config(run.config).generation.check or run.state is not RunState.DONE:
        return
    for scorer in lookup.quality_scorers(session, run):
        owed = checking.unscored(session, run, scorer).with_only_columns(func.count())
        if count := session.scalars(owed).one():
            yield Violation("checked", f"scorer {scorer.id}", f"{count} responses without a score of it")


def _duplicates(session: Session, run: Run) -> Iterator[Violation]:
    key = Response.prompt_id, Response.teacher_id, Response.sample
    repeated = (
        select(*key, func.count().label("n"))
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == Response.prompt_id))
        .group_by(*key)
        .having(func.count() > 1)
    )
    for row in _stream(session, repeated):
        found = f"teacher {row.teacher_id} has {row.n} responses of sample {row.sample} to it"
        yield Violation("duplicate", f"prompt {row.prompt_id}", found)


def _strays(session: Session, run: Run) -> Iterator[Violation]:
    """A response matches the teacher and the prompt range of the job that wrote it, in any run."""
    fits = and_(
        Job.teacher_id == Response.teacher_id,
        Response.prompt_id.between(Job.first_prompt_id, Job.last_prompt_id),
    )
    strays = (
        select(Response.prompt_id, Response.teacher_id, Response.job_id)
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == Response.prompt_id))
        .join(Job, Job.id == Response.job_id)
        .where(~func.coalesce(fits, false()))
    )
    for row in _stream(session, strays):
        found = f"job {row.job_id} wrote teacher {row.teacher_id}'s response to it, which is outside the job's range"
        yield Violation("stray", f"prompt {row.prompt_id}", found)


def _leases(session: Session, run: Run) -> Iterator[Violation]:
    """A running job has an owner and a lease; no other job has a lease."""
    is_running = Job.state == JobState.RUNNING
    is_held = and_(Job.lease_until.is_not(None), Job.owner.is_not(None))
    wrong = or_(and_(is_running, ~is_held), and_(~is_running, Job.lease_until.is_not(None)))
    for job in _stream(session, select(Job.id, Job.state).where(Job.run_id == run.id, wrong)):
        lack = "but lacks an owner or a lease" if job.state is JobState.RUNNING else "but has a lease"
        yield Violation("lease", f"job {job.id}", f"it is {job.state} {lack}")


def _transitions(session: Session, run: Run) -> Iterator[Violation]:
    """Each event of a job starts in the previous one's end state; the fence never falls, and rises with each claim."""

    def before(column: Any, at_first: Any) -> ColumnElement[Any]:
        return func.coalesce(func.lag(column).over(partition_by=Event.job_id, order_by=Event.id), at_first)

    steps = (
        select(
            Event.id,
            Event.job_id,
            Event.from_state,
            Event.to_state,
            Event.fence,
            before(Event.to_state, JobState.QUEUED.value).label("was_state"),
            before(Event.fence, 0).label("was_fence"),
        )
        .join(Job, Job.id == Event.job_id)
        .where(Job.run_id == run.id)
        .subquery()
    )
    columns = steps.c
    is_broken = columns.from_state.is_distinct_from(columns.was_state)
    is_claim = columns.to_state == JobState.RUNNING.value
    is_too_low = or_(
        columns.fence.is_(None),
        columns.fence < columns.was_fence,
        and_(is_claim, columns.fence == columns.was_fence),
    )
    wrong = (
        select(*columns, is_broken.label("is_broken"), is_too_low.label("is_too_low"))
        .where(is_broken | is_too_low)
        .order_by(columns.job_id, columns.id)
    )
    for row in _stream(session, wrong):
        if row.is_broken:
            found = f"event {row.id} starts from {row.from_state}, but the job was {row.was_state}"
            yield Violation("events", f"job {row.job_id}", found)
        if row.is_too_low:
            found = f"event {row.id} ({row.to_state}) has fence {row.fence} after fence {row.was_fence}"
            yield Violation("fence", f"job {row.job_id}", found)


def _ends(session: Session, run: Run) -> Iterator[Violation]:
    """A job's state and fence match its last event."""
    last = (
        select(Event.job_id, func.max(Event.id).label("event_id"))
        .join(Job, Job.id == Event.job_id)
        .where(Job.run_id == run.id)
        .group_by(Event.job_id)
        .subquery()
    )
    said_state = func.coalesce(Event.to_state, JobState.QUEUED.value)
    said_fence = func.coalesce(Event.fence, 0)
    wrong = (
        select(Job.id, Job.state, Job.fence, said_state.label("said_state"), said_fence.label("said_fence"))
        .outerjoin(last, last.c.job_id == Job.id)
        .outerjoin(Event, Event.id == last.c.event_id)
        .where(Job.run_id == run.id, or_(Job.state != said_state, Job.fence != said_fence))
        .order_by(Job.id)
    )
    for job in _stream(session, wrong):
        if job.state != job.said_state:
            yield Violation("events", f"job {job.id}", f"it is {job.state}, but its events say {job.said_state}")
        if job.fence != job.said_fence:
            yield Violation("fence", f"job {job.id}", f"it has fence {job.fence}, but its events say {job.said_fence}")


def _count(session: Session, query: Select[int]) -> int:
    return session.scalars(query).one()


def _stream(session: Session, query: Select[*tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the rows of a query in batches, so that even a run full of violations fits in memory."""
    return iter(session.execute(query, execution_options={"yield_per": _AT_ONCE}))
