"""What costs and limits did to the assignments of a run, as events record it."""

from __future__ import annotations

import msgspec
from msgspec import Struct
from sqlalchemy.orm import Session

from persyn.db import notes
from persyn.db.catalog import Run
from persyn.jobs import owner

#: Of the events' detail.
_KEY = "within_limits"


class TeacherLimits(Struct, frozen=True):
    """One teacher's part of an assignment within limits."""

    teacher_id: int
    prompts: int
    least: int
    most: int
    #: Reward that a further prompt for it would bring; below 0, that one less would.
    price: float


class Outcome(Struct, frozen=True):
    """An assignment within limits, as its event records it. Rewards and costs are expected ones, of all its prompts."""

    prompts: int
    #: Of costs; and whether they are known at all.
    unit: str
    cost: float | None
    budget: float | None
    cost_weight: float
    reward: float
    #: No assignment within the limits has a higher reward, less `cost_weight` times its cost.
    value: float
    bound: float
    #: If neither costs nor limits took part.
    free_reward: float
    free_cost: float | None
    #: Prompts that then would have another teacher.
    moved: int
    #: Reward that a further unit of the budget would bring.
    price: float
    teachers: list[TeacherLimits]
    #: What a unit of the router's score is worth; before it was shrunk, and its standard error.
    slope: float
    fitted: float | None
    error: float | None
    #: Whether scores did not count because the verdict is not to route.
    by_verdict: bool = False


def of_run(session: Session, run: Run) -> list[Outcome]:
    """What was recorded of a run's assignments: one, and one more for each extension."""
    return msgspec.convert(notes.noted(session, run, _KEY), list[Outcome])


def last(session: Session, run: Run) -> Outcome | None:
    """What was recorded last; None before there is anything."""
    return next(reversed(of_run(session, run)), None)


def record(session: Session, run: Run, made: Outcome) -> None:
    """Record an assignment, in its transaction."""
    notes.note(session, run, {_KEY: msgspec.to_builtins(made)}, actor=owner.actor())
