"""`persyn teachers`: the models that answer."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from sqlalchemy import func, select

from cli.open import JSON, show, store
from persyn import checks, run_file
from persyn.db.catalog import Teacher
from persyn.db.results import Response
from persyn.settings import Settings


@click.group()
def teachers() -> None:
    """List the teachers, and check what would spoil a run."""


@teachers.command("list", short_help="List the teachers and their responses.")
@JSON
def list_teachers(as_json: bool) -> None:
    """List the teacher versions in the store and how much each has answered."""
    answered = select(func.count()).where(Response.teacher_id == Teacher.id).scalar_subquery()
    columns = (Teacher.id, Teacher.name, Teacher.engine, Teacher.model, Teacher.family, Teacher.params_b)
    with store() as database, database.read() as session:
        rows = session.execute(select(*columns, answered).order_by(Teacher.id)).all()
    show([*(column.key for column in columns), "responses"], rows, as_json=as_json)


@teachers.command(short_help="Load each model once; say what would spoil a run.")
@click.argument("config", type=click.Path(path_type=Path))
@JSON
def check(config: Path, as_json: bool) -> None:
    """Load each model of the run file CONFIG once and say what would spoil the run; exit 1 when something would."""
    wanted = run_file.read(config)
    findings = []
    for name, finding in checks.check(wanted, Settings.from_environment().home):
        findings.append((finding.level, name, finding.topic, finding.message))
    show(("", "model", "what", "found"), findings, as_json=as_json)
    if any(level == "error" for level, *_ in findings):
        sys.exit(1)
