"""Second choices: a prompt whose response meets a condition of [fallback] goes to the strategy's next best teacher.

The next teachers are stored with the assignment. A prompt moves when the stage has nothing else to do, in the
transaction that plans the next jobs: killed at any moment, it has moved and has its job, or neither. What it left is a
row of `fallbacks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, bindparam, case, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from persyn.config import Condition, load_config
from persyn.db import bulk, grid, lookup, notes
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.results import Assignment, Fallback, Response, Score
from persyn.db.text import reason
from persyn.jobs import owner
from persyn.method import combined_quality
from persyn.stages import drift, limits, unassigned
from persyn.stages.batch import CHARACTERS

#: Prompts moved at once.
_CHUNK = 10_000
#: The reason of an assignment whose prompt has no further choice.
USED_UP = "fallback: no further choice"
#: What a choice has in place of a response, if its teacher was stopped before it was asked.
_NOT_ASKED = "not_asked: the teacher became worse, and was stopped before"

_quality = aliased(Score)
#: Whether a response, with its assignment and its quality, meets a condition; in the order in which they are tested.
_TESTS: dict[Condition, ColumnElement[bool]] = {
    "refused": reason(Response.failure) == "refused",
    "too_long": reason(Response.failure) == "too_long",
    "failed": Response.failure.is_not(None),
    "truncated": and_(Response.text.is_not(None), Response.finish_reason == "length"),
    "wrong": or_(Assignment.rejected, _quality.value == combined_quality.WRONG),
}
#: The columns that an assignment has in common with the row of `fallbacks` that it leaves.
_KEPT = ("choice", "teacher_id", "score", "margin", "reason", "sample")


def move(session: Session, run: Run) -> int:
    """Move the prompts whose response is not used to their next teachers; return how many.

    A prompt without a further teacher, or with as many as are allowed, returns to the first of its choices whose
    response has a text, and is not looked at again. Call it when each assigned prompt has its response, and its score
    if it gets one, under a lock on the run.
    """
    table = load_config(run.config).fallback
    if table is None:
        return 0
    stopped = {each.teacher_id for each in drift.stopped(session, run)}
    room, moves = _Room(session, run), _Moves(session, run, table.attempts, stopped)
    open_ids = select(Assignment.prompt_id).where(Assignment.run_id == run.id, Assignment.further.is_not(None))
    open_ids = open_ids.order_by(Assignment.prompt_id).limit(_CHUNK)
    last = 0
    while ids := session.scalars(open_ids.where(Assignment.prompt_id > last)).all():
        last = ids[-1]
        moves.make(session.execute(_unusable(run, table.on, stopped, (ids[0], last))).all(), room)
    moves.record()
    return moves.total


def _unusable(
    run: Run, conditions: Sequence[Condition], stopped: Collection[int], between: tuple[int, int]
) -> Select[Any]:
    """Select the assignments of which every response meets a condition, with the condition, in order of prompts.

    stopped: ids of the teachers that are not asked any more; assignments without a response of theirs are selected too.
    between: the first and the last id of the prompts.
    """
    cause = case(*((test, condition) for condition, test in _TESTS.items() if condition in conditions))
    is_owed = case((and_(Response.id.is_(None), Assignment.teacher_id.in_(stopped)), drift.DRIFT))
    of_page = and_(Assignment.run_id == run.id, Assignment.prompt_id.between(*between))
    is_quality = and_(_quality.response_id == Response.id, _quality.scorer_id == run.quality_scorer_id)
    found = (
        lookup.with_rows(select(Assignment.prompt_id).select_from(Assignment), run)
        .outerjoin(_quality, is_quality)
        .where(of_page, Assignment.further.is_not(None))
        .with_only_columns(
            Assignment.prompt_id,
            func.coalesce(func.min(is_owed), func.min(cause)).label("cause"),
            case((func.count(Response.text) == 0, func.coalesce(func.min(Response.failure), _NOT_ASKED))).label(
                "failure"
            ),
        )
        .group_by(Assignment.prompt_id)
        .having(or_(func.count() == func.count(cause), func.count(is_owed) > 0))
        .subquery()
    )
    of_assignment = (getattr(Assignment, name) for name in ("prompt_id", "further", *_KEPT))
    return (
        select(*of_assignment, found.c.cause, found.c.failure, RunPrompt.role, CHARACTERS.label("characters"))
        .join(found, found.c.prompt_id == Assignment.prompt_id)
        .join(RunPrompt, and_(RunPrompt.run_id == Assignment.run_id, RunPrompt.prompt_id == Assignment.prompt_id))
        .join(Prompt, Prompt.id == Assignment.prompt_id)
        .where(of_page)
        .order_by(Assignment.prompt_id)
    )


class _Moves:
    """The moves of one transaction."""

    def __init__(self, session: Session, run: Run, attempts: int, stopped: Collection[int]) -> None:
        self._session, self._run, self._attempts, self._stopped = session, run, attempts, stopped
        self._first = unassigned.first_sample(run)
        self._answered: dict[tuple[int, int], int] = {}
        self._causes: Counter[str] = Counter()
        self._ended = 0

    @property
    def total(self) -> int:
        """Prompts that were looked at, and have moved or ended."""
        return self._causes.total()

    def make(self, rows: Sequence[Row[Any]], room: _Room) -> None:
        """Write the moves of some prompts."""
        if not rows:
            return
        self._causes.update(row.cause for row in rows)
        if self._first is not None and any(row.role != Role.TARGET for row in rows):
            between = rows[0].prompt_id, rows[-1].prompt_id
            self._answered = unassigned.first_answered(self._session, self._run, between)
        goals = [self._goal(row, room) for row in rows]
        names = "prompt_id", *_KEPT, "cause", "failure"
        bulk.insert_new(
            self._session,
            Fallback,
            [{"run_id": self._run.id, **{name: getattr(row, name) for name in names}} for row in rows],
        )
        ended = [row.prompt_id for row, goal in zip(rows, goals, strict=True) if goal is None]
        self._ended += len(ended)
        self._write([goal for goal in goals if goal] + self._returns(ended))
        over = update(Assignment).where(Assignment.run_id == self._run.id, Assignment.prompt_id.in_(ended))
        self._session.execute(over.values(further=None).execution_options(synchronize_session=False))

    def _goal(self, row: Row[Any], room: _Room) -> dict[str, Any] | None:
        """The assignment to the next teacher that has room; None if there is none."""
        place = 0 if row.choice > self._attempts else len(row.further)
        for at, teacher_id in enumerate(row.further[:place]):
            if teacher_id in self._stopped:
                continue
            if row.role != Role.TARGET or room.take(teacher_id, row.characters):
                return {
                    "of": row.prompt_id,
                    "teacher_id": teacher_id,
                    "choice": row.choice + 1,
                    "score": None,
                    "margin": None,
                    "sample": self._sample(row, teacher_id),
                    "reason": f"fallback: {row.cause}",
                    "further": row.further[at + 1 :],
                }
        return None

    def _sample(self, row: Row[Any], teacher_id: int) -> int | None:
        """The sample of the new teacher to keep; of a calibration prompt, the first one with a text."""
        if self._first is None or row.role == Role.TARGET:
            return self._first
        return self._answered.get((row.prompt_id, teacher_id), self._first)

    def _returns(self, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
        """The assignments to return to: the first choice with a text, else the first."""
        left = select(*(getattr(Fallback, name) for name in ("prompt_id", *_KEPT))).where(
            Fallback.run_id == self._run.id, Fallback.prompt_id.in_(prompt_ids)
        )
        found: dict[int, dict[str, Any]] = {}
        for row in self._session.execute(left.order_by(Fallback.failure.is_not(None), Fallback.choice)):
            if row.prompt_id not in found:
                kept = {name: getattr(row, name) for name in _KEPT} | {"reason": USED_UP, "further": None}
                # Of several samples, one is chosen anew.
                found[row.prompt_id] = {
                    "of": row.prompt_id,
                    **kept,
                    "sample": None if self._first is None else row.sample,
                }
        return list(found.values())

    def _write(self, goals: Sequence[dict[str, Any]]) -> None:
        if not goals:
            return
        names = (*_KEPT, "further")
        changed = update(Assignment).where(Assignment.run_id == self._run.id, Assignment.prompt_id == bindparam("of"))
        values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in names}
        self._session.connection().execute(
            changed.values(**values, rejected=False, job_id=None),
            [{"of": goal["of"], **{f"new_{name}": goal[name] for name in names}} for goal in goals],
        )

    def record(self) -> None:
        """Record an event with the number of prompts by cause, and how many of them had no further choice."""
        if not self.total:
            return
        detail = {"fallback": dict(self._causes), "ended": self._ended}
        notes.note(self._session, self._run, detail, actor=owner.actor())


class _Room:
    """What the limits of [strategy] leave for further choices of the remaining prompts.

    Every request counts, also one whose response is not used: a capacity is of requests, a budget of their expected
    costs, and a maximum share is of prompts that a teacher was given.
    """

    def __init__(self, session: Session, run: Run) -> None:
        strategy = load_config(run.config).strategy
        self._is_limited = strategy.is_limited
        if not self._is_limited:
            return
        teachers, cells = lookup.teachers(session, run.id), grid.read(session, run)
        self._column = {teacher.id: column for column, teacher in enumerate(teachers)}
        counts, characters = unassigned.given(session, run, teachers)
        of_run = select(func.count()).where(RunPrompt.run_id == run.id, RunPrompt.role == Role.TARGET)
        names = [teacher.name for teacher in teachers]
        self._limits = limits.limits_of(strategy, names, session.scalars(of_run).one())
        self._costs = limits.costs_of(session, run, cells, characters)
        self._counts = counts
        self._spent = float((counts * self._costs.fixed + characters * self._costs.rate).sum())

    def take(self, teacher_id: int, characters: int) -> bool:
        """Give a teacher one more prompt, if the limits allow it."""
        if not self._is_limited:
            return True
        column = self._column[teacher_id]
        cost = float(self._costs.fixed[column] + characters * self._costs.rate[column])
        if self._counts[column] >= self._limits.most[column] or self._spent + cost > self._limits.budget:
            return False
        self._counts[column] += 1
        self._spent += cost
        return True
