"""Delete a run and what only it has, in small transactions; what runs share stays.

Nothing else happens to a run from the first transaction on: it is in the state `deleting`, in which no job is claimed
and nothing continues it. A deletion that was killed goes on when it is called again.
"""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from sqlalchemy import ColumnElement, CursorResult, Select, delete, func, select
from sqlalchemy.orm import Session

from persyn.config import fingerprint_of
from persyn.dataset import export
from persyn.dataset.kinds import KINDS
from persyn.db import lookup
from persyn.db.base import Base
from persyn.db.catalog import Run, RunPrompt, RunState, RunTeacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Fallback, Origin, Response, Router, RouterScore
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.db.work import Batch, Event, Job
from persyn.errors import UsageError
from persyn.operations import at_work
from persyn.runs import pipeline
from persyn.stages import recalibrations

#: Prompts, jobs and other rows per transaction. A job has up to hundreds of responses, which no longer name it then.
_PROMPTS, _JOBS, _ROWS = 1_000, 20, 20_000
#: Batches named in a message.
_MOST_BATCHES = 5
#: The folder of PERSYN_HOME that holds checkpoints.
_ROUTERS = "routers"

Progress = Callable[[str, int, int], object]
"""Called with what is being deleted, the total number, and how many are done."""


class DeletionOptions(Struct, frozen=True):
    """What is deleted with a run although others may want it."""

    #: Generated responses, with their scores, that no other run needs: none has both their prompt and their teacher.
    responses: bool = False
    #: The record of batches that a provider has, whose results are lost and may be billed.
    abandon_batches: bool = False


_KEEP = DeletionOptions()


class Deletion(Struct, frozen=True):
    """What the deletion of a run has removed and kept, as far as this call did it."""

    #: The rows by table, without those that the database deletes with them, such as the events of a job.
    deleted: dict[str, int]
    #: Responses of the run's teachers to its prompts that are kept, for other runs.
    kept_responses: int
    #: Whether the router is kept because another run has it, or because it was imported.
    keeps_router: bool
    #: The folders of its routers' checkpoints, which are removed.
    checkpoints: list[Path] = field(default_factory=list)
    #: Datasets and trained students, which are kept.
    kept_folders: list[Path] = field(default_factory=list)


def delete_run(
    database: Database,
    run_id: int,
    home: Path,
    *,
    actor: str,
    options: DeletionOptions = _KEEP,
    progress: Progress = lambda *_: None,
) -> Deletion:
    """Delete a run; raise `UsageError` while workers hold jobs of it, or a provider has batches of it to collect.

    Prompts, teachers, students, scorers, and imported responses and routers are always kept.

    home: datasets and trained students in it are kept, the checkpoints of routers are removed.
    """
    with database.write() as session:
        routers = _begin(session, run_id, actor, options)
        folders = _folders(session, run_id, home)
    deleted: Counter[str] = Counter()
    kept = _delete_prompts(database, run_id, deleted, progress, with_responses=options.responses)
    for router in routers:
        _delete_all(database, RouterScore, (RouterScore.router_id == router.id,), deleted, progress)
    checkpoints = [_remove_checkpoint(home, router.path) for router in routers]
    with database.write() as session:  # before the events, which name those of earlier calibrations
        earlier = Router.id.in_([each.id for each in routers]), Router.id.not_in(_current(run_id))
        deleted["routers"] += _delete(session, Router, *earlier)
    _delete_outcomes(database, run_id, deleted)
    _delete_jobs(database, run_id, deleted, progress)
    _delete_all(database, Event, (Event.run_id == run_id,), deleted, progress)
    with database.write() as session:
        keeps_router = _delete_run(session, run_id, deleted)
    rows = {name: count for name, count in deleted.items() if count}
    return Deletion(rows, kept, keeps_router, [folder for folder in checkpoints if folder is not None], folders)


def _begin(session: Session, run_id: int, actor: str, options: DeletionOptions) -> list[Router]:
    """Take a run out of every other use; return its routers that no other run has, except those being deleted."""
    run = lookup.locked(session, run_id)
    if run.state is not RunState.DELETING:
        if not options.abandon_batches:
            _require_no_batches(session, run)
        if found := at_work.workers(session, run_id):
            raise UsageError(
                f"{at_work.named(found)} hold{'s' * (len(found) == 1)} jobs of run {run.name}; pause it, and delete it "
                f"when they have given them back: persyn run pause {run.name}"
            )
        pipeline.finish(session, run, RunState.DELETING, actor, None)
    routers = _own_routers(session, run, Run.state != RunState.DELETING)
    for router in routers:  # no run that is planned from now on finds it
        router.fingerprint = fingerprint_of(["deleted", router.id, uuid.uuid4().hex])
    session.flush()
    return routers


def _require_no_batches(session: Session, run: Run) -> None:
    """Raise `UsageError` if a provider has batches of a run that were not collected."""
    name = func.coalesce(Batch.provider_id, "with key " + Batch.key)
    found = session.scalars(
        select(name).join(Job).where(Job.run_id == run.id, Batch.collected_at.is_(None)).order_by(Batch.created_at)
    ).all()
    if found:
        names = ", ".join(found[:_MOST_BATCHES]) + ", ..." * (len(found) > _MOST_BATCHES)
        raise UsageError(
            f"a provider has batches of run {run.name} that were not collected, {len(found):,}: {names}; 'persyn run "
            f"resume {run.name}' collects them, and 'persyn run delete {run.name} --abandon-batches' deletes the run "
            "without their results, which may be billed"
        )


def _own_routers(session: Session, run: Run, *others: ColumnElement[bool]) -> list[Router]:
    """The routers of a run, locked, that were not imported and that no other run has: one for each calibration.

    others: which other runs count.
    """
    ids = {run.router_id, *(each.router_id for each in recalibrations.of_run(session, run))} - {None}
    having = select(Run.router_id).where(Run.router_id.in_(ids), Run.id != run.id, *others)
    of_run = Router.id.in_(ids), Router.learned.is_(None), Router.id.not_in(having)
    return list(session.scalars(select(Router).where(*of_run).order_by(Router.id).with_for_update()))


def _current(run_id: int) -> Select[Any]:
    return select(Run.router_id).where(Run.id == run_id, Run.router_id.is_not(None))


def _delete_run(session: Session, run_id: int, deleted: Counter[str]) -> bool:
    """Delete a run's row, and its router if it is the last that has it; return whether it had a router that is kept."""
    run = session.get(Run, run_id, with_for_update=True)
    if run is None:  # another process has finished this deletion
        return False
    routers = _own_routers(session, run)
    session.execute(delete(Run).where(Run.id == run_id))
    deleted["routers"] += _delete(session, Router, Router.id.in_([router.id for router in routers]))
    return not routers and run.router_id is not None


def _folders(session: Session, run_id: int, home: Path) -> list[Path]:
    """The datasets and trained students of a run that exist."""
    run = session.get_one(Run, run_id)
    trained = session.scalars(select(Training.path).where(Training.run_id == run_id).order_by(Training.id))
    folders = [export.default_folder(home, run.name, kind) for kind in KINDS]
    return [folder for folder in [*folders, *map(Path, trained)] if folder.is_dir()]


def _delete_prompts(
    database: Database, run_id: int, deleted: Counter[str], progress: Progress, *, with_responses: bool
) -> int:
    """Delete a run's prompts with their assignments; return how many responses to them are kept."""
    mine = RunPrompt.run_id == run_id
    with database.read() as session:
        total = session.scalars(select(func.count()).where(mine)).one()
    kept = done = 0
    while True:
        with database.write() as session:
            upcoming = session.scalars(
                select(RunPrompt.prompt_id).where(mine).order_by(RunPrompt.prompt_id).limit(_PROMPTS)
            ).all()
            if not upcoming:
                return kept
            part = RunPrompt.prompt_id <= upcoming[-1]
            prompts = select(RunPrompt.prompt_id).where(mine, part)
            sharing = _sharing(session, run_id)  # read each time, since runs are started meanwhile
            if with_responses:
                deleted["responses"] += sum(_delete_responses(session, prompts, *each) for each in sharing.items())
            is_answer = Response.prompt_id.in_(prompts), Response.teacher_id.in_(sharing)
            kept += session.scalars(select(func.count()).select_from(Response).where(*is_answer)).one()
            assigned = Assignment.run_id == run_id, Assignment.prompt_id <= upcoming[-1]
            deleted["assignments"] += _delete(session, Assignment, *assigned)
            passed = Fallback.run_id == run_id, Fallback.prompt_id <= upcoming[-1]
            deleted["fallbacks"] += _delete(session, Fallback, *passed)
            done += _delete(session, RunPrompt, mine, part)
        deleted["run_prompts"] = done
        progress("prompts", total, done)


def _sharing(session: Session, run_id: int) -> dict[int, list[int]]:
    """The run's teachers, each with the other runs that have it."""
    mine = session.scalars(select(RunTeacher.teacher_id).where(RunTeacher.run_id == run_id)).all()
    found: dict[int, list[int]] = {teacher_id: [] for teacher_id in mine}
    shared = select(RunTeacher.teacher_id, RunTeacher.run_id).where(RunTeacher.run_id != run_id)
    for teacher_id, other in session.execute(shared.where(RunTeacher.teacher_id.in_(mine))):
        found[teacher_id].append(other)
    return found


def _delete_responses(session: Session, prompts: Select[int], teacher_id: int, others: list[int]) -> int:
    """Delete a teacher's responses to prompts that none of the other runs has."""
    needed = select(RunPrompt.prompt_id).where(RunPrompt.run_id.in_(others), RunPrompt.prompt_id == Response.prompt_id)
    mine = Response.teacher_id == teacher_id, Response.origin == Origin.GENERATED
    return _delete(session, Response, *mine, Response.prompt_id.in_(prompts), ~needed.exists())


def _delete_outcomes(database: Database, run_id: int, deleted: Counter[str]) -> None:
    """Delete the outcomes of evaluations of the run's trainings, one evaluation at a time."""
    of_run = select(Evaluation.id).join(Training).where(Training.run_id == run_id)
    with database.read() as session:
        evaluations = session.scalars(of_run).all()
    for evaluation_id in evaluations:
        with database.write() as session:
            deleted["outcomes"] += _delete(session, Outcome, Outcome.evaluation_id == evaluation_id)


def _delete_jobs(database: Database, run_id: int, deleted: Counter[str], progress: Progress) -> None:
    """Delete a run's jobs, with their events, expenses, batches and loads; what they wrote names no job then."""
    with database.read() as session:
        total = session.scalars(select(func.count()).where(Job.run_id == run_id)).one()
    while True:
        with database.write() as session:
            upcoming = session.scalars(select(Job.id).where(Job.run_id == run_id).order_by(Job.id).limit(_JOBS)).all()
            if not upcoming:
                return
            deleted["jobs"] += _delete(session, Job, Job.id.in_(upcoming))
        progress("jobs", total, deleted["jobs"])


def _delete_all(
    database: Database, model: type[Base], which: tuple[Any, ...], deleted: Counter[str], progress: Progress
) -> None:
    """Delete the router scores or events that a condition selects, some at a time."""
    name = model.__tablename__
    key: Any = model.prompt_id if model is RouterScore else model.id  # type: ignore[attr-defined]
    with database.read() as session:
        total = session.scalars(select(func.count()).select_from(model).where(*which)).one()
    while True:
        with database.write() as session:
            part = select(key).where(*which).order_by(key).limit(_ROWS).subquery()
            last = session.scalars(select(func.max(part.c[0]))).one()
            if last is None:
                return
            deleted[name] += _delete(session, model, *which, key <= last)
        progress(name.replace("_", " "), total, deleted[name])


def _remove_checkpoint(home: Path, path: str) -> Path | None:
    folder = home / path
    if folder.parent != home / _ROUTERS or not folder.is_dir():
        return None
    shutil.rmtree(folder)
    return folder


def _delete(session: Session, model: type[Base], *which: Any) -> int:
    gone = session.execute(delete(model).where(*which).execution_options(synchronize_session=False))
    assert isinstance(gone, CursorResult)
    return gone.rowcount
