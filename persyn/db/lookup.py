"""Find rows: a run by its name, its teachers in head order, the responses that it uses."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, true
from sqlalchemy.orm import Session

from persyn.config import COMBINED, StudentTable, load_config
from persyn.db.catalog import Role, Run, RunPrompt, RunState, RunTeacher, Scorer, Student, Teacher
from persyn.db.results import NO_TEXT, Assignment, Fallback, Response, answers_assignment, is_candidate, sample_indices
from persyn.db.text import reason
from persyn.errors import UsageError

#: At most so many runs are named in an error.
_MOST = 5


def run(session: Session, name: str) -> Run:
    """The run of this name; `UsageError` names the runs that exist, and refuses one that is being deleted."""
    found = any_run(session, name)
    require_whole(found)
    return found


def any_run(session: Session, name: str) -> Run:
    """The run of this name, also while it is being deleted; `UsageError` names the runs that exist."""
    found = session.scalars(select(Run).where(Run.name == name)).one_or_none()
    if found is None:
        place = session.connection().engine.url.render_as_string(hide_password=True)
        raise UsageError(
            f"there is no run named {name!r} in the store {place}, which has {_existing(session, name)}; "
            "set PERSYN_DATABASE_URL or PERSYN_HOME to use another store"
        )
    return found


def n_prompts(session: Session, run_id: int) -> int:
    """How many prompts a run has."""
    return session.scalars(select(func.count()).where(RunPrompt.run_id == run_id)).one()


def locked(session: Session, run_id: int) -> Run:
    """The current row of a run, locked against other transitions until the transaction ends.

    The lock does not exclude the insertion of rows with a foreign key to the run. Under a stronger one, two
    transactions that each insert such a row and then advance the run would deadlock. Raises `UsageError` for a run that
    was deleted.
    """
    run = session.get(Run, run_id, with_for_update={"key_share": True}, populate_existing=True)
    if run is None:
        raise UsageError("the run is no longer in the store")
    return run


def whole(session: Session, run_id: int) -> Run:
    """Like `locked`; raises `UsageError` for a run that is being deleted."""
    run = locked(session, run_id)
    require_whole(run)
    return run


def require_whole(run: Run) -> None:
    """Raise `UsageError` for a run that is being deleted: rows of it are gone."""
    if run.state is RunState.DELETING:
        raise UsageError(f"run {run.name} is being deleted; 'persyn run delete {run.name}' finishes that")


def teachers(session: Session, run_id: int) -> Sequence[Teacher]:
    """A run's teachers in head order."""
    return session.scalars(
        select(Teacher).join(RunTeacher).where(RunTeacher.run_id == run_id).order_by(RunTeacher.position)
    ).all()


def scorers(run: Run) -> tuple[int, ...]:
    """The ids of the scorers of a run's quality and, if it is scored, learnability."""
    student = () if run.learnability_scorer_id is None else (run.learnability_scorer_id,)
    return run.quality_scorer_id, *student


def quality_scorers(session: Session, run: Run) -> list[Scorer]:
    """The scorers that are asked for a run's quality, in the order of the run file: one, or several, combined."""
    return parts(session, session.get_one(Scorer, run.quality_scorer_id))


def parts(session: Session, scorer: Scorer) -> list[Scorer]:
    """The scorers that one of a quality combines; itself, if it combines none."""
    if scorer.kind != COMBINED:
        return [scorer]
    contents = [part["scorer"] for part in scorer.options["parts"]]
    rows = session.scalars(select(Scorer).where(Scorer.fingerprint.in_(contents)))
    by_content = {row.fingerprint: row for row in rows}
    return [by_content[content] for content in contents]


def measures(session: Session, run: Run) -> dict[int, str]:
    """{scorer id: what it measures in a run}: quality, learnability or, of several scorers, `quality.1`, ..."""
    named = dict(zip(scorers(run), ("quality", "learnability"), strict=False))
    several = [scorer.id for scorer in quality_scorers(session, run) if scorer.id not in named]
    return named | {scorer_id: f"quality.{number}" for number, scorer_id in enumerate(several, start=1)}


def asked(session: Session, run: Run) -> list[Scorer]:
    """The scorers that the responses of a run's grid are given to, the student first."""
    of_student = run.learnability_scorer_id
    student = [] if of_student is None else [session.get_one(Scorer, of_student)]
    return [*student, *quality_scorers(session, run)]


def student(session: Session, run: Run) -> tuple[Student, StudentTable]:
    """A run's student, and its table in the run file; raise `UsageError` for a run without one."""
    table = load_config(run.config).student
    if run.student_id is None or table is None:
        raise UsageError(
            f"run {run.name} has no student; start a run under another name with a [student] and an alpha above 0: it "
            "uses the stored responses and qualities"
        )
    return session.get_one(Student, run.student_id), table


def position(session: Session, run_id: int, teacher_id: int) -> int:
    """A teacher's position in a run, which is also that of its table in the run's configuration."""
    of_run = RunTeacher.run_id == run_id, RunTeacher.teacher_id == teacher_id
    return session.scalars(select(RunTeacher.position).where(*of_run)).one()


def is_used(run: Run) -> ColumnElement[bool]:
    """Whether a run uses a response: one of its grid, or of a teacher that is or was assigned.

    For a select from `run_prompts` joined to `responses` and, by an outer join, to `assignments`.
    """
    config = load_config(run.config)
    is_in_grid = and_(RunPrompt.role != Role.TARGET, Response.sample < config.run.samples)
    is_asked = Response.sample < config.generation.samples
    was = select(Fallback.choice).where(Fallback.run_id == run.id, Fallback.prompt_id == Response.prompt_id)
    was_assigned = was.where(Fallback.teacher_id == Response.teacher_id).exists()
    is_assigned = Assignment.teacher_id == Response.teacher_id
    return or_(is_in_grid, and_(or_(is_assigned, was_assigned) if config.fallback else is_assigned, is_asked))


def in_dataset(run: Run) -> ColumnElement[bool]:
    """Join condition of `assignments` and `responses`: the response is a row of the run's unfiltered dataset."""
    generation = load_config(run.config).generation
    return and_(is_candidate(), Response.sample < generation.rows) if generation.keep == "all" else answers_assignment()


def of_dataset(run: Run, *columns: Any) -> Select[Any]:
    """Select columns of the responses that are rows of a run's unfiltered dataset, and of their assignments."""
    joined = select(*columns).select_from(Assignment).join(Response, in_dataset(run))
    return joined.where(Assignment.run_id == run.id, Response.text.is_not(None))


def of_grid(run: Run, *columns: Any) -> Select[Any]:
    """Select columns of the responses to a run's calibration prompts, and of these `run_prompts` and `run_teachers`."""
    return (
        select(*columns)
        .select_from(RunPrompt)
        .join(Response, Response.prompt_id == RunPrompt.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET, Response.text.is_not(None))
        .where(Response.sample < load_config(run.config).run.samples)
    )


def is_scores_only(session: Session, run: Run) -> bool:
    """Whether a run has no response to export because all that it has were imported as scores only."""
    if session.execute(of_dataset(run, Response.id).limit(1)).first() is not None:
        return False
    of_run = select(Response.id).join(Assignment, is_candidate()).where(Assignment.run_id == run.id)
    return session.execute(of_run.where(reason(Response.failure) == NO_TEXT).limit(1)).first() is not None


def with_rows(query: Select[Any], run: Run) -> Select[Any]:
    """Join a select from `assignments` to the responses that the dataset should have, and add their `sample`.

    One or more per prompt; the response is null where it is missing.
    """
    generation = load_config(run.config).generation
    if generation.keep != "all":
        return query.add_columns(Assignment.sample).outerjoin(Response, answers_assignment())
    samples = sample_indices(generation.rows)
    answered = and_(is_candidate(), Response.sample == samples.c.sample)
    return query.add_columns(samples.c.sample).join(samples, true()).outerjoin(Response, answered)


def _existing(session: Session, name: str) -> str:
    """The names of runs, the most similar ones where there are many."""
    names = session.scalars(select(Run.name).order_by(Run.id.desc())).all()
    if not names:
        return "no runs"
    if len(names) <= _MOST:
        return f"the runs {', '.join(names)}" if len(names) > 1 else f"the run {names[0]}"
    near = difflib.get_close_matches(name, names, n=_MOST) or names[:_MOST]
    return f"{len(names):,} runs, such as {', '.join(near)}; 'persyn run list' shows all"
