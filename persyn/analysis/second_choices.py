"""Say in words which responses a run did not use, and what became of their prompts."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Run, Teacher
from persyn.db.results import Assignment, Fallback
from persyn.stages.drift import DRIFT
from persyn.stages.fallback import USED_UP


def sentences(session: Session, run: Run) -> list[str]:
    """What [fallback] did so far; empty without it, and while every response is used."""
    if load_config(run.config).fallback is None:
        return []
    by_cause: Counter[str] = Counter()
    by_teacher: Counter[str] = Counter()
    unasked: Counter[str] = Counter()
    left = select(Teacher.name, Fallback.cause, func.count()).join(Teacher, Teacher.id == Fallback.teacher_id)
    for name, cause, count in session.execute(
        left.where(Fallback.run_id == run.id).group_by(Teacher.name, Fallback.cause)
    ):
        if cause == DRIFT:
            unasked[name] += count
        else:
            by_cause[cause] += count
            by_teacher[name] += count
    became_worse = (
        f"{unasked.total():,} prompts left a teacher that became worse before it was asked ({_listed(unasked)})"
    )
    said = [became_worse] if unasked else []
    if not by_cause:
        return said
    of_run = select(func.count()).where(Assignment.run_id == run.id)
    moved = session.scalars(of_run.where(Assignment.choice > 1)).one()
    ended = session.scalars(of_run.where(Assignment.reason == USED_UP)).one()
    said += [
        f"{by_cause.total():,} responses met a condition of [fallback] ({_listed(by_cause)}; {_listed(by_teacher)}), "
        f"and {moved:,} prompts have another teacher"
    ]
    if ended:
        said.append(
            f"for {ended:,} prompts no further teacher was left or had room; they keep their first response with a text"
        )
    return said


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
