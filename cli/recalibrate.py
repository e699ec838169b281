"""`persyn run recalibrate`: have all teachers answer more prompts of a run, and fit its router again."""

from __future__ import annotations

import click

from persyn.analysis import recalibration
from persyn.cli.context import RUN, find_run, store
from persyn.cli.plan import show_plan, spent_by
from persyn.cli.waiting import waiting
from persyn.config import load_config
from persyn.db.connect import Database
from persyn.runs.recalibration import Choose


@click.command(short_help="Have all teachers answer more prompts, and fit the router again.")
@RUN
@click.option("--prompts", required=True, type=click.IntRange(min=1), metavar="N", help="How many prompts.")
@click.option(
    "--choose",
    "how",
    type=click.Choice(["active", "random"]),
    default="active",
    show_default=True,
    help="Where the router has learned least, or at random.",
)
@click.option("--plan", "is_plan", is_flag=True, help="Show what the remaining work would take, and change nothing.")
def recalibrate(run: str, prompts: int, how: Choose, is_plan: bool) -> None:
    """Add N of RUN's prompts to its calibration prompts, fit its router again, execute it and write its dataset.

    RUN is done, or it generates. All teachers answer the N prompts, except where a response is stored; the responses
    are scored, and a router is fitted to all calibration prompts. Prompts without a response are assigned again, by a
    verdict of their own; others keep their teachers. The hold-out stays as it is. 'run status' shows what changed.

    With 'active', prompts of extensions come first, until these are sampled as densely as the prompts that RUN was
    started with; from then on, and without extensions, it is the same as 'random'.

    \b
    persyn run recalibrate small --prompts 200 --plan
    persyn run recalibrate small --prompts 200
    """
    from persyn.cli import run as running  # which has this command

    running.require_celery()
    with store() as database:
        with database.read() as session:
            run_id = find_run(session, run).id
        if is_plan:
            _show_plan(database, run_id, prompts, how)
            return
        begin(database, run_id, prompts, how)
        running.work(database, run_id)


def begin(database: Database, run_id: int, prompts: int, how: Choose = "active") -> None:
    """Begin to recalibrate a run, and say so."""
    with waiting("drawing prompts"):
        made = recalibration.recalibrate(database, run_id, prompts, how)
    fewer = ", as no more are left" if made.prompts < prompts else ""
    click.echo(
        f"all teachers are asked {made.prompts:,} more prompts{fewer}, {made.of_extensions:,} of them from extensions; "
        f"{made.reopened:,} prompts without a response are assigned again"
    )


def _show_plan(database: Database, run_id: int, prompts: int, how: Choose) -> None:
    with waiting("counting prompts"):
        found = recalibration.plan(database, run_id, prompts, how)
    with database.read() as session:
        config = load_config(find_run(session, found.name).config)
    show_plan(found, config, spent_by(database, found.name))
