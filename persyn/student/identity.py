"""Identify a training by what determines it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import fingerprint_of
from persyn.db.catalog import Run, Student
from persyn.db.trained import Training


def fingerprint(run: str, student: str, dataset_hash: str, settings: Any) -> str:
    """The fingerprint of a training, from the run's name, the student's fingerprint, the dataset and the settings."""
    return fingerprint_of({"run_id": run, "student_id": student, "dataset_hash": dataset_hash, "settings": settings})


def rename(session: Session, run: Run) -> None:
    """Adopt the name of a run in the fingerprints of its trainings, so that none is repeated."""
    of_run = select(Training, Student.fingerprint).join(Student, Student.id == Training.student_id)
    for each, student in session.execute(of_run.where(Training.run_id == run.id)).all():
        each.fingerprint = fingerprint(run.name, student, each.dataset_hash, each.settings)
    session.flush()
