"""What a run's recalibrations asked and what they changed, as events record it."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from persyn.db import grid, notes
from persyn.db.catalog import Run, RunPrompt
from persyn.db.grid import Grid
from persyn.db.results import Assignment
from persyn.errors import UsageError
from persyn.jobs import owner
from persyn.method.intervals import Interval
from persyn.method.verdict import paired
from persyn.stages import verdict

#: Of the event's detail, when all prompts are assigned again.
_OVER = "refitted"


class Recalibration(Struct, frozen=True):
    """Prompts that became calibration prompts together."""

    #: From 1.
    number: int
    prompts: int
    #: Those of them that extensions have added.
    of_extensions: int
    #: Prompts whose teacher had not answered them, and that the new router assigns again.
    reopened: int
    #: Id of the router that there was.
    router_id: int


class TeacherChange(Struct, frozen=True):
    """How many of the reopened prompts a teacher had, and has."""

    teacher_id: int
    before: int
    after: int


class Change(Struct, frozen=True):
    """What a recalibration changed."""

    number: int
    router_id: int
    #: Prompts that neither router was fitted to: the hold-out and, cross-fitted, those that this recalibration asked.
    measured: int
    #: Mean rewards there, of the router before and the new one; None where nothing could be measured.
    before: float | None
    after: float | None
    #: What the new one gains, with a 95% interval.
    gain: Interval | None
    #: Reopened prompts that have another teacher now.
    moved: int
    teachers: list[TeacherChange]


def of_run(session: Session, run: Run) -> list[Recalibration]:
    """The recalibrations of a run in order; the last may not be over."""
    return msgspec.convert(notes.noted(session, run, verdict.RECALIBRATED), list[Recalibration])


def changes(session: Session, run: Run) -> list[Change]:
    """What the recalibrations of a run that are over have changed, in order."""
    return msgspec.convert(notes.noted(session, run, _OVER), list[Change])


def conclude(session: Session, run: Run) -> None:
    """Record what the last recalibration has changed, unless that is known; call it when all prompts are assigned."""
    begun = of_run(session, run)
    if not begun or len(changes(session, run)) == len(begun):
        return
    made = _change(session, run, begun[-1])
    notes.note(session, run, {_OVER: msgspec.to_builtins(made)}, actor=owner.actor())


def _change(session: Session, run: Run, begun: Recalibration) -> Change:
    assert run.router_id is not None
    cells = grid.read(session, run)
    before, after, gain, measured = _gain(session, run, begun, cells)
    counts: dict[int, list[int]] = {int(teacher_id): [0, 0] for teacher_id in cells.teacher_ids}
    moved = 0
    for former, teacher_id, prompts in session.execute(_reassigned(run)):
        counts[former][0] += prompts
        counts[teacher_id][1] += prompts
        moved += prompts if former != teacher_id else 0
    teachers = [TeacherChange(teacher_id, *both) for teacher_id, both in counts.items() if any(both)]
    return Change(begun.number, run.router_id, measured, before, after, gain, moved, teachers)


def _gain(
    session: Session, run: Run, begun: Recalibration, cells: Grid
) -> tuple[float | None, float | None, Interval | None, int]:
    """The mean rewards of both routers where neither has learned, the difference, and the number of prompts."""
    drawn = select(RunPrompt.prompt_id).where(RunPrompt.run_id == run.id, RunPrompt.recalibration == begun.number)
    is_asked = cells.is_holdout | np.isin(cells.prompt_ids, session.scalars(drawn).all())
    try:
        now = verdict.unseen_scores(session, run, cells)
    except UsageError:  # the new router was not cross-fitted, and there is no hold-out
        return None, None, None, 0
    was, _ = verdict.scores_of(session, run, begun.router_id, cells)
    known = is_asked & ~np.isnan(now + was).any(axis=1) & ~np.isnan(cells.rewards()).all(axis=1)
    if not known.any():
        return None, None, None, 0
    one, other, gain = paired(was[known], now[known], cells.rewards()[known])
    return one, other, gain, int(known.sum())


def _reassigned(run: Run) -> Any:
    """Count the reopened prompts by the teacher that they had and the one that they have."""
    of_prompt = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    key = RunPrompt.former_teacher_id, Assignment.teacher_id
    return (
        select(*key, func.count())
        .join(Assignment, of_prompt)
        .where(RunPrompt.run_id == run.id, RunPrompt.former_teacher_id.is_not(None))
        .group_by(*key)
    )
