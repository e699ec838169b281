"""Find rows: a run by its name, its teachers in head order, the responses that it uses."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.results import Assignment, Response
from persyn.errors import UsageError

#: At most so many runs are named in an error.
_MOST = 5


def run(session: Session, name: str) -> Run:
    """The run of this name; `UsageError` names the runs that exist."""
    found = session.scalars(select(Run).where(Run.name == name)).one_or_none()
    if found is None:
        place = session.connection().engine.url.render_as_string(hide_password=True)
        raise UsageError(
            f"there is no run named {name!r} in the store {place}, which has {_existing(session, name)}; "
            "set PERSYN_DATABASE_URL or PERSYN_HOME to use another store"
        )
    return found


def teachers(session: Session, run_id: int) -> Sequence[Teacher]:
    """A run's teachers in head order."""
    return session.scalars(
        select(Teacher).join(RunTeacher).where(RunTeacher.run_id == run_id).order_by(RunTeacher.position)
    ).all()


def is_used(run: Run) -> ColumnElement[bool]:
    """Whether a run uses a response: one of its grid, or of an assigned teacher.

    For a select from `run_prompts` joined to `responses` and, by an outer join, to `assignments`.
    """
    samples = load_config(run.config).run.samples
    is_in_grid = and_(RunPrompt.role != Role.TARGET, Response.sample < samples)
    return or_(is_in_grid, and_(Assignment.teacher_id == Response.teacher_id, Response.sample == 0))


def _existing(session: Session, name: str) -> str:
    """The names of runs, the most similar ones where there are many."""
    names = session.scalars(select(Run.name).order_by(Run.id.desc())).all()
    if not names:
        return "no runs"
    if len(names) <= _MOST:
        return f"the runs {', '.join(names)}" if len(names) > 1 else f"the run {names[0]}"
    near = difflib.get_close_matches(name, names, n=_MOST) or names[:_MOST]
    return f"{len(names):,} runs, such as {', '.join(near)}; 'persyn run list' shows all"
