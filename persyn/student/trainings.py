"""Train a student on a run's dataset, once per dataset and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from persyn.dataset import export, manifest
from persyn.dataset.filters import AssignedRow
from persyn.dataset.formats import inlined
from persyn.dataset.options import ExportOptions
from persyn.db import bulk, lookup
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response
from persyn.db.trained import Training
from persyn.errors import UsageError
from persyn.llm.identity import hub_revision, identify, require_unchanged
from persyn.llm.options import FORM_OPTIONS
from persyn.llm.protocols import ModelSpec
from persyn.llm.template import Conversation
from persyn.stages.batch import conversation
from persyn.student import identity
from persyn.student import train as training
from persyn.student.lock import locked
from persyn.student.train import TrainingCallback, TrainingSettings

#: The folder of PERSYN_HOME that holds trained students.
FOLDER = "students"


def train(
    database: Database, run_name: str, settings: TrainingSettings, *, gpus: int, home: Path, progress: TrainingCallback
) -> Training:
    """Train the student of a finished run on its dataset; an existing training is returned unchanged.

    home: weights and checkpoints are stored in its folder `students`, so that an interrupted training can resume. The
          dataset is the one described by `exported`.

    Deleted weights are trained again. Raises `UsageError` for an unfinished run, a dataset that cannot be reproduced or
    is empty, a student that has changed, and one that is being trained by another process.
    """
    options = exported(run_name, home)
    with database.read() as session:
        run = _finished(session, run_name)
        student, table = lookup.student(session, run)
        dataset_hash = _hash(_conversations(session, run, options))
    row = {
        "run_id": run.id,
        "student_id": student.id,
        "dataset_hash": dataset_hash,
        "settings": msgspec.to_builtins(settings),
    }
    fingerprint = identity.fingerprint(run.name, student.fingerprint, dataset_hash, row["settings"])
    found = _find(database, fingerprint)
    if found is not None and Path(found.path).is_dir():
        return found
    require_unchanged(student.model, student.revision)
    # Conversations have the same form as in scoring.
    form = {name: value for name, value in table.options.items() if name in FORM_OPTIONS}
    spec = ModelSpec("", student.model, hub_revision(student.revision), gpus, form)
    folder = home / FOLDER / f"{run.name}-{fingerprint[:12]}"
    with locked(folder) as require_mine:

        def step(done: int, steps: int, loss: float | None) -> None:
            require_mine()
            progress(done, steps, loss)

        if not (folder / training.MODEL).exists():
            with database.read() as session:
                training.prepare(spec, _conversations(session, run, options), settings, folder)
        notes = training.train(spec, settings, folder, step)
    path = folder / training.MODEL
    row |= {
        "notes": msgspec.to_builtins(notes),
        "path": str(path),
        "revision": identify(str(path)).revision,
    }
    with database.write() as session:
        # The run may have been renamed meanwhile.
        name = _present(session, run, path).name
        row["fingerprint"] = fingerprint = identity.fingerprint(
            name, student.fingerprint, dataset_hash, row["settings"]
        )
        if found is not None:  # its weights had been deleted
            session.execute(update(Training).where(Training.fingerprint == fingerprint).values(**row))
        bulk.insert_new(session, Training, [row])
    made = _find(database, fingerprint)
    assert made is not None
    return made


def exported(run_name: str, home: Path) -> ExportOptions:
    """The options of the latest export of a run's own dataset; the defaults if there is none."""
    return manifest.options_of(home / "datasets" / run_name) or ExportOptions()


def n_responses(session: Session, run_id: int) -> int:
    """The number of rows in a run's unfiltered dataset."""
    of_run = lookup.in_dataset(session.get_one(Run, run_id))
    answered = select(func.count()).select_from(Assignment).join(Response, of_run)
    return session.scalars(answered.where(Assignment.run_id == run_id, Response.text.is_not(None))).one()


def _finished(session: Session, name: str) -> Run:
    run = lookup.run(session, name)
    if run.state is not RunState.DONE:
        raise UsageError(
            f"run {name} is {run.state}, its dataset is incomplete; 'persyn run resume {name}' continues it"
        )
    if lookup.student(session, run)[1].engine == "fake":
        raise UsageError(f"run {name} has a fake student, which cannot be trained")
    return run


def _present(session: Session, run: Run, weights: Path) -> Run:
    """A run as it is now, locked; raises `UsageError` if it was deleted while its student was trained."""
    try:
        return lookup.whole(session, run.id)
    except UsageError as error:
        raise UsageError(f"{error}; the trained student is in {weights}, and in no run") from error


def _conversations(session: Session, run: Run, options: ExportOptions) -> Iterator[Conversation]:
    """Yield the conversations to train on, in the dataset's order; at least one."""
    n_rows = 0
    try:
        for row in export.training_rows(session, run.id, options):
            n_rows += 1
            yield _example(row, options)
    except UsageError as error:
        raise UsageError(
            f"the dataset of run {run.name} cannot be recreated as it was exported: {error}; "
            f"'persyn export {run.name}' with other options writes a new one"
        ) from error
    if not n_rows:
        raise UsageError(f"nothing to train on: the dataset of run {run.name} has no row in its split train")


def _example(row: AssignedRow, options: ExportOptions) -> Conversation:
    """A row with its reasoning where the exported dataset has it."""
    is_inline = options.reasoning == "inline"
    response = inlined(row.response, row.reasoning) if is_inline else row.response
    reasoning = row.reasoning if options.reasoning == "field" else None
    return Conversation(conversation(row), response, reasoning, row.tool_calls, row.tools)


def _hash(conversations: Iterator[Conversation]) -> str:
    total = hashlib.sha256()
    for each in conversations:
        # Without reasoning and tools, as in versions of PerSyn that knew neither.
        total.update(msgspec.json.encode(each if any(part is not None for part in each[2:]) else each[:2]))
    return total.hexdigest()


def _find(database: Database, fingerprint: str) -> Training | None:
    with database.read() as session:
        return session.scalars(select(Training).where(Training.fingerprint == fingerprint)).one_or_none()
