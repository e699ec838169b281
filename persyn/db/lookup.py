"""Find rows: a run by its name, its teachers in head order."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.db.catalog import Run, RunTeacher, Teacher
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


def position(session: Session, run_id: int, teacher_id: int) -> int:
    """A teacher's position in a run, which is also that of its table in the run's configuration."""
    of_run = RunTeacher.run_id == run_id, RunTeacher.teacher_id == teacher_id
    return session.scalars(select(RunTeacher.position).where(*of_run)).one()


def _existing(session: Session, name: str) -> str:
    """The names of runs, the most similar ones where there are many."""
    names = session.scalars(select(Run.name).order_by(Run.id.desc())).all()
    if not names:
        return "no runs"
    if len(names) <= _MOST:
        return f"the runs {', '.join(names)}" if len(names) > 1 else f"the run {names[0]}"
    near = difflib.get_close_matches(name, names, n=_MOST) or names[:_MOST]
    return f"{len(names):,} runs, such as {', '.join(near)}; 'persyn run list' shows all"
