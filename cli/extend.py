"""`persyn run extend`: add prompts to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from persyn.analysis import extension
from persyn.analysis.extension import Teller
from persyn.analysis.novelty import Distance
from persyn.cli import recalibrate
from persyn.cli.context import RUN, find_run, plain, store, warn
from persyn.cli.imports import NAMES, ON_ERROR, renamed, show_report
from persyn.cli.plan import show_plan, spent_by
from persyn.cli.progress import counting_rows
from persyn.cli.waiting import waiting
from persyn.config import load_config
from persyn.db.connect import Database
from persyn.ingest.layouts import PROMPT
from persyn.ingest.prompt_import import PromptFiles
from persyn.settings import Settings


@click.command(short_help="Add prompts to a run that is done or running.")
@RUN
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@NAMES
@ON_ERROR
@click.option("--plan", "is_plan", is_flag=True, help="Show what the remaining work would take, and add nothing.")
@click.option("--anyway", is_flag=True, help="Also add prompts that are far from the calibration prompts.")
@click.option(
    "--recalibrate",
    "n_asked",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also add far prompts, and have all teachers answer N prompts before any is assigned; see 'recalibrate'.",
)
def extend(
    run: str,
    files: tuple[Path, ...],
    is_plan: bool,
    anyway: bool,
    n_asked: int | None,
    **reading: Any,
) -> None:
    """Add the prompts in FILES to RUN, which is done or running; execute it, and write its dataset again.

    Files are read as by 'prompts import'. Prompts that are in the run already are not added again. The run's router, as
    it is, assigns the others: no calibration response is generated, and assigned prompts keep their teacher. Costs and
    limits of [strategy], and the [budget], hold for all prompts of the run together.

    First, the new prompts are compared with the calibration prompts. If too many are far from all of them, the router
    does not know such prompts, and nothing is added (exit 2), except with --recalibrate or --anyway.

    \b
    persyn run extend small more.jsonl --plan
    persyn run extend small more.jsonl
    """
    from persyn.cli import run as running  # which has this command

    if is_plan and n_asked:
        raise click.UsageError("--plan and --recalibrate exclude each other: what is asked depends on what was added")
    given = PromptFiles(files, renamed(reading["names"], PROMPT), reading["on_error"])
    running.require_celery()
    with store() as database:
        with database.read() as session:
            run_id = find_run(session, run).id
        with waiting("comparing the prompts with the calibration prompts"):
            distance = extension.measure(database, run_id, given, Settings.from_environment().home, Teller(warn))
        if not (is_plan or anyway or n_asked):
            extension.require_near(run, distance)
        _say(distance)
        if is_plan:
            _show_plan(database, run_id, given)
            return
        with counting_rows() as count, waiting("writing the prompts"):
            done = extension.extend(database, run_id, given, distance, Teller(warn, count))
        show_report(done.report, what="answer")
        if not done.made.prompts:
            click.echo(f"run {run} has all of these prompts already; nothing was added")
            return
        click.echo(f"{done.made.prompts:,} prompts were added to run {run}")
        if n_asked:
            recalibrate.begin(database, run_id, n_asked)
        running.work(database, run_id)


def _say(distance: Distance | None) -> None:
    """Say how far the new prompts are from the calibration prompts, where that was measured."""
    if distance is None:
        return
    click.echo(plain(str(distance)))
    for name, count in distance.unknown.items():
        warn(f"{count:,} new prompts have a {name!r} that no calibration prompt has, so the router ignores it")


def _show_plan(database: Database, run_id: int, files: PromptFiles) -> None:
    with counting_rows() as count, waiting("counting prompts"):
        found = extension.plan(database, run_id, files, Teller(warn, count))
    with database.read() as session:
        config = load_config(find_run(session, found.name).config)
    show_plan(found, config, spent_by(database, found.name))
