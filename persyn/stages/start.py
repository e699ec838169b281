"""A run file becomes a run: its models as versions, its prompts, its calibration draw."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import QualityTable, RunConfig, StudentTable, TeacherTable
from persyn.db import bulk
from persyn.db.base import Base
from persyn.db.catalog import Run, RunTeacher, Scorer, Student, Teacher
from persyn.errors import UsageError
from persyn.llm.identity import UNKNOWN, Identity, identify

Identities: TypeAlias = Mapping[tuple[str, str | None], Identity]
#: Engines whose model lies here, where it can be looked at.
_LOADED = ("vllm", "transformers")
_DESCRIPTIVE = ("name", "family", "license", "params_b", "price_in", "price_out")


def find(session: Session, config: RunConfig) -> Run | None:
    """The run of this name, if there is one; `UsageError` when it was started from another configuration."""
    run = session.scalars(select(Run).where(Run.name == config.run.name)).one_or_none()
    if run is not None and run.config_hash != config.digest():
        changed = sorted(_differences(run.config, config.frozen()))
        raise UsageError(
            f"run {run.name!r} exists with another configuration (changed: {', '.join(changed)}); "
            f"give the new one another name, or go on with the old one: persyn run resume {run.name}"
        )
    return run


def identities(config: RunConfig) -> Identities:
    """What a run's models are, by (model, revision): a hub may be asked, and large files read.

    Raises `UsageError` for a model that is not there.
    """
    tables = [(table.model, table.revision) for table in config.teachers if table.engine in _LOADED]
    if config.student.engine != "fake":
        tables.append((config.student.model, config.student.revision))
    if config.quality.kind == "reward_model":
        tables.append((config.quality.model, config.quality.revision))
    return {table: identify(*table) for table in dict.fromkeys(tables)}


def create(session: Session, config: RunConfig, known: Identities, *, stage: str) -> Run:
    """Register a run and its models, without prompts yet."""
    student = _student(session, config.student, known)
    run = Run(
        name=config.run.name,
        stage=stage,
        config=config.frozen(),
        config_hash=config.digest(),
        seed=config.run.seed,
        student_id=student.id,
        quality_scorer_id=_quality(session, config.quality, known),
        learnability_scorer_id=_learnability(session, student, config.student),
    )
    session.add(run)
    session.flush()
    for position, teacher in enumerate(config.teachers):
        session.add(RunTeacher(run_id=run.id, position=position, teacher_id=_teacher(session, teacher, known)))
    session.flush()
    return run


def _teacher(session: Session, table: TeacherTable, known: Identities) -> int:
    found = known[table.model, table.revision] if table.engine in _LOADED else UNKNOWN
    row = msgspec.to_builtins(table) | _version(found)
    decisive = {key: value for key, value in row.items() if key not in _DESCRIPTIVE}
    return _register(session, Teacher, decisive, row)


def _student(session: Session, table: StudentTable, known: Identities) -> Student:
    found = known[table.model, table.revision] if table.engine != "fake" else UNKNOWN
    row = {"name": table.name, "model": table.model} | _version(found)
    student_id = _register(session, Student, row, row)
    return session.get_one(Student, student_id)


def _learnability(session: Session, student: Student, table: StudentTable) -> int:
    row = {
        "kind": table.engine,
        "model": student.model,
        "revision": student.revision,
        "options": table.options,
        "gpus": table.gpus,
        "student_id": student.id,
    }
    return _register(session, Scorer, row | {"template_hash": student.template_hash}, row)


def _quality(session: Session, table: QualityTable, known: Identities) -> int:
    found = known[table.model, table.revision] if table.kind == "reward_model" else UNKNOWN
    row = {
        "kind": table.kind,
        "model": table.model,
        "revision": found.revision,
        "options": table.options,
        "gpus": table.gpus,
    }
    return _register(session, Scorer, row | {"template_hash": found.template_hash}, row)


def _version(found: Identity) -> dict[str, Any]:
    return {"revision": found.revision, "template_hash": found.template_hash}


def _register(session: Session, model: type[Base], decisive: dict[str, Any], row: dict[str, Any]) -> int:
    """The id of the row with this fingerprint, made if it is new; two who register at once get the same row."""
    fingerprint = hashlib.sha256(msgspec.json.encode(decisive, order="sorted")).hexdigest()
    bulk.insert_new(session, model, [row | {"fingerprint": fingerprint}])
    columns: Any = model
    return int(session.scalars(select(columns.id).where(columns.fingerprint == fingerprint)).one())


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if old == new else [place]
