"""`persyn teachers`: list and check teachers."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from sqlalchemy import func, select

from persyn.cli.completion import run_names
from persyn.cli.context import JSON, RUN, find_run, show, store
from persyn.cli.transport import VALUES, change
from persyn.cli.waiting import waiting
from persyn.config import TeacherTable, load_config
from persyn.db import lookup
from persyn.db.catalog import Teacher
from persyn.db.results import Response
from persyn.llm import transport
from persyn.llm.protocols import Finding
from persyn.runs import run_file
from persyn.runs.checks import chat_templates, functions, host, models, servers
from persyn.runs.checks import teachers as checked
from persyn.settings import Settings


@click.group()
def teachers() -> None:
    """List teachers, and check them before a run."""


@teachers.command("list", short_help="List the teachers and their responses.")
@click.option("--run", help="Only the teachers of this run, and how it reaches them.", shell_complete=run_names)
@JSON
def list_teachers(run: str | None, as_json: bool) -> None:
    """List the teacher versions in the store and how much each has answered."""
    answered = select(func.count()).where(Response.teacher_id == Teacher.id).scalar_subquery()
    columns = (Teacher.id, Teacher.name, Teacher.engine, Teacher.model, Teacher.family, Teacher.params_b)
    with store() as database, database.read() as session:
        rows = [tuple(row) for row in session.execute(select(*columns, answered).order_by(Teacher.id))]
        names = [*(column.key for column in columns), "responses"]
        if run is not None:
            found = find_run(session, run)
            by_id = {row[0]: row for row in rows}
            of_run = zip(lookup.teachers(session, found.id), load_config(found.config).teachers, strict=True)
            rows = [(*by_id[teacher.id], table.gpus, _reached(table)) for teacher, table in of_run]
            names += ["gpus", "transport"]
    show(names, rows, as_json=as_json)


def _reached(table: TeacherTable) -> str:
    return ", ".join(f"{name}={value}" for name, value in transport.of(table.engine, table.options).items())


@teachers.command("set", short_help="Change how a run reaches a teacher, also while it runs.")
@RUN
@click.argument("teacher")
@VALUES
def set_transport(run: str, teacher: str, values: tuple[str, ...]) -> None:
    """Change how RUN reaches TEACHER, or how fast it runs: base_url, concurrency, gpus, ... The run may be running.

    KEY is `gpus` or an option of the teacher's engine that changes no response; 'KEY=' restores its default. Stored
    responses are kept, requests in flight may finish, and a wait for the old server ends. VALUE is written as in a run
    file; text needs no quotation marks.

    \b
    persyn teachers set small ada base_url=http://10.0.0.7:8000/v1 concurrency=8
    persyn teachers set small ada 'base_url=["http://10.0.0.7:8000/v1", "http://10.0.0.8:8000/v1"]'
    """
    change(run, f"teacher {teacher}", values)


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
