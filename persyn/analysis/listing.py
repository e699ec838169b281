"""List runs, prompts and failed jobs page by page, with search and filters, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any

from msgspec import Struct
from sqlalchemy import (
    ColumnElement,
    Select,
    String,
    and_,
    cast,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.orm import Session, aliased

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunState, RunTeacher, Student, Teacher
from persyn.db.results import Assignment, Response, Router, Score, answers_assignment
from persyn.db.text import reason
from persyn.db.work import Job, JobState

#: Characters of a prompt's text shown in a list.
_EXCERPT = 240
#: Prompts searched per query, and the time limit for filling a page.
_STRETCH, _SECONDS = 4000, 0.08
#: Prompts inspected for the names of metadata fields.
_LOOKED_AT = 2_000
_NO_FIELD = '"\\'


class PromptStatus(StrEnum):
    """The progress of a prompt in a run."""

    UNASSIGNED = "unassigned"
    WAITING = "waiting"
    ANSWERED = "answered"
    FAILED = "failed"
    REJECTED = "rejected"


class Order(StrEnum):
    """The order of prompts: by id, or by ascending margin, closest decisions first."""

    ID = "id"
    MARGIN = "margin"


class PromptFilter(Struct, frozen=True):
    """Filters for prompts; None or an empty text does not filter."""

    #: Case-insensitive match in the prompt's text, or its exact id in its file.
    text: str = ""
    role: Role | None = None
    standing: PromptStatus | None = None
    #: The name of the assigned teacher.
    teacher: str = ""
    #: The first word of the assignment's reason.
    reason: str = ""
    #: The first word of the failure of a response or score used by the run; "any" matches all failures.
    failure: str = ""
    #: Inclusive bounds of the margin.
    margin_from: float | None = None
    margin_to: float | None = None
    #: Inclusive bounds of the quality of the assigned response, not normalised.
    quality_from: float | None = None
    quality_to: float | None = None
    #: A field of the prompt's metadata, and its value as text.
    field: str = ""
    value: str = ""
    order: Order = Order.ID

    @property
    def has_margin(self) -> bool:
        """Whether prompts without a margin are excluded."""
        return self.order is Order.MARGIN or self.margin_from is not None or self.margin_to is not None


class Cursor(Struct, frozen=True):
    """The last row of a page, after which the next page begins."""

    prompt_id: int
    margin: float | None = None


class PromptListing(Struct, frozen=True):
    """A prompt in a list."""

    prompt_id: int
    role: Role
    #: The beginning of its text, and the length of the whole in characters.
    excerpt: str
    characters: int
    teacher: str | None
    reason: str | None
    margin: float | None
    standing: PromptStatus
    failure: str | None
    response_tokens: int | None
    #: In the quality scorer's unit, not normalised; None if the response was not scored.
    quality: float | None


class PromptPage(Struct, frozen=True):
    """Rows of a page and the cursor after which the next begins; None on the last page."""

    rows: list[PromptListing]
    following: Cursor | None
    #: The time limit ended the search: prompts beyond this page were not searched.
    is_partial: bool = False


class RunRow(Struct, frozen=True):
    """A run in a list."""

    id: int
    name: str
    state: RunState
    stage: str
    #: None for a run without a student.
    student: str | None
    created_at: datetime
    finished_at: datetime | None
    error: str | None
    #: Mean hold-out reward of the router, and of the best single teacher; None before a router is fitted.
    reward: float | None
    static_reward: float | None


class FailedJobs(Struct, frozen=True):
    """Jobs of a stage that ended the same way."""

    stage: str
    state: JobState
    error: str | None
    jobs: int
    #: One of the jobs, for reference.
    first_id: int
    last_at: datetime | None


def runs(session: Session, *, limit: int) -> list[RunRow]:
    """List the newest runs first."""
    found = session.execute(
        select(
            Run.id,
            Run.name,
            Run.state,
            Run.stage,
            Student.name.label("student"),
            Run.created_at,
            Run.finished_at,
            Run.error,
            Router.metrics,
        )
        .outerjoin(Student, Student.id == Run.student_id)
        .outerjoin(Router, Router.id == Run.router_id)
        .order_by(Run.id.desc())
        .limit(limit)
    )
    return [_run_row(**row._mapping) for row in found]


def _run_row(metrics: dict[str, Any] | None, **columns: Any) -> RunRow:
    rewards = {name: (metrics or {}).get(name, {}).get("routed_reward") for name in ("router", "static")}
    return RunRow(**columns, reward=rewards["router"], static_reward=rewards["static"])


def sizes(session: Session) -> dict[str, int]:
    """The number of prompts per run name; takes time proportional to the number of prompts."""
    counted = select(Run.name, func.count()).join(RunPrompt, RunPrompt.run_id == Run.id).group_by(Run.name)
    return dict(session.execute(counted).all())


def failed_jobs(session: Session, run: Run, *, limit: int) -> list[FailedJobs]:
    """List the errors of unsuccessful jobs of a run, the most frequent first."""
    found = session.execute(
        select(
            Job.stage,
            Job.state,
            Job.error,
            func.count().label("jobs"),
            func.min(Job.id).label("first_id"),
            func.max(Job.finished_at).label("last_at"),
        )
        .where(Job.run_id == run.id, Job.state.in_((JobState.FAILED, JobState.CANCELLED)))
        .group_by(Job.stage, Job.state, Job.error)
        .order_by(func.count().desc(), func.min(Job.id))
        .limit(limit)
    )
    return [FailedJobs(**row._mapping) for row in found]


def teachers(session: Session, run: Run) -> list[str]:
    """The names of a run's teachers, in head order."""
    return [teacher.name for teacher in lookup.teachers(session, run.id)]


def fields(session: Session, run: Run) -> list[str]:
    """The metadata fields of a run's first prompts, without those that queries cannot address."""
    first = select(Prompt.meta).join(RunPrompt, RunPrompt.prompt_id == Prompt.id).where(RunPrompt.run_id == run.id)
    metas = session.scalars(first.order_by(RunPrompt.prompt_id).limit(_LOOKED_AT))
    return sorted({field for meta in metas for field in meta if is_field(field)})


def is_field(name: str) -> bool:
    """Whether queries can address a metadata field of this name: SQLite's JSON paths cannot quote every name."""
    return not any(character in name for character in _NO_FIELD)


def reasons(session: Session, run: Run) -> list[str]:
    """The first words of the reasons of a run's assignments; takes time proportional to their number."""
    given = select(reason(Assignment.reason)).where(Assignment.run_id == run.id).distinct()
    return sorted(session.scalars(given))


def prompts(
    session: Session,
    run: Run,
    filters: PromptFilter,
    *,
    after: Cursor | None = None,
    limit: int = 50,
    seconds: float = _SECONDS,
) -> PromptPage:
    """A page of a run's prompts; sorting by margin excludes prompts without one.

    seconds: time limit of the search; when it is reached, the page may have fewer rows than exist, or none, so that
             response times stay bounded for any run and filter.
    """
    until = time.monotonic() + seconds
    keys = (Assignment.margin, Assignment.prompt_id) if filters.order is Order.MARGIN else (RunPrompt.prompt_id,)
    query = _rows(run, filters).where(*_conditions(run, filters)).order_by(*keys)
    found: list[Any] = []
    while True:
        end = _end(session, run, filters, after)
        stretch = query.where(*_between(keys, after, end))
        if filters.order is Order.ID:
            # Implied by the join, but PostgreSQL does not infer it and would read all prompts.
            stretch = stretch.where(*_between((Prompt.id,), after, end))
        found += session.execute(stretch.limit(limit + 1 - len(found))).all()
        rows = [_row(row) for row in found[:limit]]
        if len(found) > limit:
            return PromptPage(rows, Cursor(rows[-1].prompt_id, rows[-1].margin))
        if end is None or time.monotonic() > until:
            return PromptPage(rows, end, is_partial=end is not None)
        after = end


def _end(session: Session, run: Run, filters: PromptFilter, after: Cursor | None) -> Cursor | None:
    """The last of the next prompts in index order that fill one stretch; None if there are fewer."""
    if filters.order is Order.MARGIN:
        query = select(Assignment.prompt_id, Assignment.margin).where(Assignment.run_id == run.id)
        query = query.where(*_in_margin(filters))
        keys: tuple[Any, ...] = (Assignment.margin, Assignment.prompt_id)
    elif filters.teacher:
        query = select(Assignment.prompt_id, null().label("margin")).join(Teacher)
        query = query.where(Assignment.run_id == run.id, Teacher.name == filters.teacher)
        keys = (Assignment.prompt_id,)
    else:
        query = select(RunPrompt.prompt_id, null().label("margin")).where(RunPrompt.run_id == run.id)
        query = query.where(*_is_placed(run, filters))
        keys = (RunPrompt.prompt_id,)
    last = session.execute(
        query.where(*_between(keys, after, None)).order_by(*keys).offset(_STRETCH - 1).limit(1)
    ).first()
    return None if last is None else Cursor(last.prompt_id, last.margin)


def _between(keys: tuple[Any, ...], after: Cursor | None, end: Cursor | None) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if after is not None:
        found.append(_key(keys) > _value(keys, after))
    if end is not None:
        found.append(_key(keys) <= _value(keys, end))
    return found


def _key(keys: tuple[Any, ...]) -> Any:
    return tuple_(*keys) if len(keys) > 1 else keys[0]


def _value(keys: tuple[Any, ...], cursor: Cursor) -> Any:
    return tuple_(literal(cursor.margin), literal(cursor.prompt_id)) if len(keys) > 1 else cursor.prompt_id


def _rows(run: Run, filters: PromptFilter) -> Select[Any]:
    assigned = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    answered = answers_assignment()
    return (
        select(
            RunPrompt.prompt_id,
            RunPrompt.role,
            func.substr(Prompt.text, 1, _EXCERPT).label("excerpt"),
            func.length(Prompt.text).label("characters"),
            Teacher.name.label("teacher"),
            Assignment.reason,
            Assignment.margin,
            Assignment.rejected,
            Response.id.label("response_id"),
            Response.failure,
            Response.response_tokens,
            Score.value.label("quality"),
        )
        .join(Prompt, Prompt.id == RunPrompt.prompt_id)
        # Required rows use an inner join, because an outer join is read from its left side, whatever the indexes.
        .join(Assignment, assigned, isouter=not filters.has_margin)
        .outerjoin(Teacher, Teacher.id == Assignment.teacher_id)
        .outerjoin(Response, answered)
        .outerjoin(Score, and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id))
        .where(RunPrompt.run_id == run.id)
    )


def _conditions(run: Run, filters: PromptFilter) -> list[ColumnElement[bool]]:
    """The conditions of all active filters."""
    text = filters.text
    possible: list[tuple[bool, Callable[[], ColumnElement[bool]]]] = [
        (bool(text), lambda: or_(Prompt.text.icontains(text, autoescape=True), Prompt.source_id == text)),
        (filters.standing is not None, lambda: _has_status(filters.standing)),
        (bool(filters.teacher), lambda: Teacher.name == filters.teacher),
        (bool(filters.reason), lambda: reason(Assignment.reason) == filters.reason),
        (filters.quality_from is not None, lambda: Score.value >= filters.quality_from),
        (filters.quality_to is not None, lambda: Score.value <= filters.quality_to),
        (bool(filters.field), lambda: cast(Prompt.meta[filters.field].as_string(), String) == filters.value),
    ]
    found = [condition() for is_wanted, condition in possible if is_wanted]
    return found + _is_placed(run, filters) + (_in_margin(filters) if filters.has_margin else [])


def _is_placed(run: Run, filters: PromptFilter) -> list[ColumnElement[bool]]:
    """Conditions on columns of the run's own rows that an index supports."""
    found: list[ColumnElement[bool]] = []
    if filters.role is not None:
        found.append(RunPrompt.role == filters.role)
    if filters.failure:
        found += _failed(run, filters.failure)
    return found


def _in_margin(filters: PromptFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [Assignment.margin.is_not(None)]
    if filters.margin_from is not None:
        found.append(Assignment.margin >= filters.margin_from)
    if filters.margin_to is not None:
        found.append(Assignment.margin <= filters.margin_to)
    return found


def _has_status(standing: PromptStatus | None) -> ColumnElement[bool]:
    conditions: dict[PromptStatus | None, ColumnElement[bool]] = {
        None: true(),
        PromptStatus.UNASSIGNED: Assignment.teacher_id.is_(None),
        PromptStatus.WAITING: and_(Assignment.teacher_id.is_not(None), Response.id.is_(None), ~Assignment.rejected),
        PromptStatus.ANSWERED: Response.text.is_not(None),
        PromptStatus.FAILED: Response.failure.is_not(None),
        PromptStatus.REJECTED: Assignment.rejected.is_(True),
    }
    return conditions[standing]


def _failed(run: Run, why: str) -> list[ColumnElement[bool]]:
    """Conditions for a failed response used by the run, or a failed score of one in its grid.

    There are two conditions: the first uses the index on failures across runs; the second restricts its few rows to
    this run.
    """
    found, given = aliased(Response), aliased(Assignment)
    mine = select(RunTeacher.teacher_id).where(RunTeacher.run_id == run.id)
    scored = select(Score.response_id).where(Score.scorer_id.in_(lookup.scorers(run)), _is(Score.failure, why))
    for_any = union_all(
        select(found.prompt_id).where(found.teacher_id.in_(mine), _is(found.failure, why)),
        select(found.prompt_id).where(found.id.in_(scored)),
    )
    is_in_grid = and_(RunPrompt.role != Role.TARGET, found.sample < load_config(run.config).run.samples)
    is_given = exists().where(
        given.run_id == run.id,
        given.prompt_id == found.prompt_id,
        given.teacher_id == found.teacher_id,
        found.sample == given.sample,
    )
    is_its_own = or_(and_(_is(found.failure, why), or_(is_in_grid, is_given)), and_(is_in_grid, found.id.in_(scored)))
    for_this = exists().where(found.prompt_id == RunPrompt.prompt_id, found.teacher_id.in_(mine), is_its_own)
    return [RunPrompt.prompt_id.in_(for_any), for_this]


def _is(failure: Any, why: str) -> ColumnElement[bool]:
    known: ColumnElement[bool] = failure.is_not(None)
    return known if why == "any" else and_(known, reason(failure) == why)


def _row(found: Any) -> PromptListing:
    if found.teacher is None:
        standing = PromptStatus.UNASSIGNED
    elif found.rejected:
        standing = PromptStatus.REJECTED
    elif found.response_id is None:
        standing = PromptStatus.WAITING
    else:
        standing = PromptStatus.ANSWERED if found.failure is None else PromptStatus.FAILED
    columns = found._mapping
    return PromptListing(
        standing=standing, **{name: columns[name] for name in PromptListing.__struct_fields__ if name != "standing"}
    )
