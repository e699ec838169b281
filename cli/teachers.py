"""`persyn teachers`: list and check teachers."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from sqlalchemy import func, select

from persyn.cli.context import JSON, show, store
from persyn.cli.waiting import waiting
from persyn.db.catalog import Teacher
from persyn.db.results import Response
from persyn.llm.protocols import Finding
from persyn.runs import run_file
from persyn.runs.checks import chat_templates, functions, host, models, servers
from persyn.runs.checks import teachers as checked
from persyn.settings import Settings


@click.group()
def teachers() -> None:
    """List teachers, and check them before a run."""


@teachers.command("list", short_help="List the teachers and their responses.")
@JSON
def list_teachers(as_json: bool) -> None:
    """List the teacher versions in the store and how much each has answered."""
    answered = select(func.count()).where(Response.teacher_id == Teacher.id).scalar_subquery()
    columns = (Teacher.id, Teacher.name, Teacher.engine, Teacher.model, Teacher.family, Teacher.params_b)
    with store() as database, database.read() as session:
        rows = session.execute(select(*columns, answered).order_by(Teacher.id)).all()
    show([*(column.key for column in columns), "responses"], rows, as_json=as_json)


@teachers.command(short_help="Load each teacher once, and report what would spoil a run.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--ping", is_flag=True, help="Also send one tiny request to each server, to check the key and the model.")
@JSON
def check(config: Path, ping: bool, as_json: bool) -> None:
    """Load each teacher of the run file CONFIG once and report what would spoil the run; exit 1 when something would.

    Also checks the chat templates of the other models, functions, servers, GPUs and memory.

    Without --ping, nothing is sent to a server; only the connection is tested.
    """
    wanted = run_file.read(config)
    found: list[tuple[str, Finding]] = []
    with waiting("checking GPUs, memory and servers"):
        found += [*servers.check(wanted), *host.check(wanted)]
    with waiting("rendering chat templates"):
        # A teacher's template is checked together with its model, but not for tools.
        checked_later = {f"teacher {teacher.name}" for teacher in wanted.teachers}
        found += [
            (whose, one)
            for whose, one in chat_templates.check(wanted)
            if whose not in checked_later or one.topic == "tools"
        ]
    with waiting("importing functions"):
        found += functions.check(wanted)
    home = Settings.from_environment().home
    prompts = checked.longest_prompts(wanted)
    wrong = {whose for whose, finding in found if finding.level == "error"}
    for teacher in wanted.teachers:
        if f"teacher {teacher.name}" in wrong:
            continue  # loading failed already, with the reason
        with waiting(f"loading {teacher.name}"):
            found += checked.check_one(teacher, prompts, home)
    judges = [each for each in models.served(wanted) if not each.whose.startswith("teacher ")]
    found += [(judge.whose, servers.seen(judge.spec)) for judge in judges if judge.whose not in wrong]
    if ping:
        with waiting("waiting for servers"):
            found += servers.ping(wanted)
    findings = [(one.level, whose.removeprefix("teacher "), one.topic, one.message) for whose, one in found]
    show(("", "model", "what", "found"), findings, as_json=as_json)
    if any(level == "error" for level, *_ in findings):
        sys.exit(1)
