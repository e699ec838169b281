"""Recalibrate a run, or only plan that, and say what it changed."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy.orm import Session

from persyn.analysis import plan as planning
from persyn.analysis import spending
from persyn.analysis.plan import Plan
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.jobs import owner
from persyn.runs import recalibration
from persyn.runs.recalibration import Choose
from persyn.stages import recalibrations
from persyn.stages.recalibrations import Change, Recalibration


def recalibrate(database: Database, run_id: int, n: int, how: Choose) -> Recalibration:
    """Have all teachers answer n more prompts of a run; in one transaction, which continues the run.

    Raises `UsageError` as `recalibration.ask` does; then nothing is changed.
    """
    with database.write() as session:
        made = recalibration.ask(session, run_id, n, how, actor=owner.actor())
        spending.add_calibration_to_plan(session, session.get_one(Run, run_id))
        recalibration.go_on(session, run_id, made, actor=owner.actor())
    return made


def plan(database: Database, run_id: int, n: int, how: Choose) -> Plan:
    """The remaining work of a run with n more calibration prompts; nothing is stored.

    Raises `UsageError` like `recalibrate`.
    """
    with database.write() as session:
        recalibration.ask(session, run_id, n, how, actor=owner.actor())
        found = planning.of_run(session, session.get_one(Run, run_id))
        session.rollback()
    return found


def listed(session: Session, run: Run) -> list[dict[str, Any]]:
    """The recalibrations of a run as plain values, each with its `change`, None until it is over."""
    over = {change.number: msgspec.to_builtins(change) for change in recalibrations.changes(session, run)}
    begun = msgspec.to_builtins(recalibrations.of_run(session, run))
    return [each | {"change": over.get(each["number"])} for each in begun]


def words(session: Session, run: Run) -> list[str]:
    """What each recalibration of a run asked, and what it changed as far as it has come."""
    over = {change.number: change for change in recalibrations.changes(session, run)}
    names = {teacher.id: teacher.name for teacher in lookup.teachers(session, run.id)}
    said = []
    for each in recalibrations.of_run(session, run):
        of = f", {each.of_extensions:,} of them from extensions" if each.of_extensions else ""
        text = f"recalibration {each.number}: all teachers were asked {each.prompts:,} more prompts{of}"
        change = over.get(each.number)
        said.append(f"{text}; {_changed(each, change, names)}" if change else f"{text}; not over yet")
    return said


def _changed(begun: Recalibration, change: Change, names: dict[int, str]) -> str:
    if change.gain is None:
        reward = "no prompt tells what the new router gains"
    else:
        low, high = (f"{end:+.3f}" for end in (change.gain.low, change.gain.high))
        reward = (
            f"reward of the router {change.before:.3f} before and {change.after:.3f} now, {change.gain.mean:+.3f} "
            f"(95%: {low} to {high}), on {change.measured:,} prompts that neither was fitted to"
        )
    if not begun.reopened:
        return f"{reward}; all prompts were answered already, and keep their teachers"
    shares = ", ".join(f"{names[each.teacher_id]} {each.before:,} to {each.after:,}" for each in change.teachers)
    return f"{reward}; {change.moved:,} of {begun.reopened:,} unanswered prompts changed teachers ({shares})"
