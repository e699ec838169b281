"""The commands of `persyn run` that change a run as a whole: pause it, set its priority, rename and delete it."""

from __future__ import annotations

import click

from persyn.cli.context import RUN, find_run, plain, store
from persyn.cli.progress import Meter
from persyn.db import lookup
from persyn.errors import UsageError
from persyn.jobs import owner
from persyn.operations.deletion import Deletion, DeletionOptions, delete_run
from persyn.operations.renaming import rename as rename_run
from persyn.runs import scheduling
from persyn.runs.scheduling import MOST_PRIORITY
from persyn.settings import Settings


@click.command(short_help="Pause a run while it is worked.")
@RUN
@click.option("--reason", metavar="TEXT", help="Why, shown with the state of the run.")
def pause(run: str, reason: str | None) -> None:
    """Stop RUN until 'run resume': none of its jobs is claimed from now on.

    Workers that hold jobs of it learn of this within seconds (a sixth of PERSYN_LEASE_SECONDS): they send no further
    requests, save the results of those in flight, and give the jobs back. Commands that wait for the run end with exit
    code 4.
    """
    with store() as database, database.write() as session:
        scheduling.pause(session, find_run(session, run), actor=owner.actor(), why=reason)
    click.echo(f"run {run} is paused; 'persyn run resume {run}' continues it")


@click.command(short_help="Set which run is worked first.", context_settings={"ignore_unknown_options": True})
@RUN
@click.argument("priority", metavar="N", type=click.IntRange(-MOST_PRIORITY, MOST_PRIORITY))
def priority(run: str, priority: int) -> None:
    """Set the priority of RUN to N, from -1000 to 1000; a new run has 0, and the highest is claimed first.

    Jobs that workers hold are finished first. Workers also turn to another model for a run of a higher priority.
    """
    with store() as database, database.write() as session:
        scheduling.prioritise(session, find_run(session, run), priority, actor=owner.actor())
    click.echo(f"run {run} has priority {priority}")


@click.command(short_help="Give a run another name.")
@RUN
@click.argument("name", metavar="NEW")
def rename(run: str, name: str) -> None:
    """Rename RUN to NEW, also while it is worked. Its datasets in PERSYN_HOME move to the folder of the new name.

    Change the name in the run file, too: with the old one, 'run start' would start another run. If it was interrupted,
    'persyn run rename NEW NEW' moves the datasets that are left.
    """
    with store() as database:
        with database.read() as session:
            run_id = find_run(session, run).id
        moved = rename_run(database, run_id, name, Settings.from_environment().home, actor=owner.actor())
    click.echo(f'run {run} is now {name}; in its run file, write: name = "{name}"')
    for folder in moved:
        click.echo(f"its dataset is now in {folder}")


@click.command(short_help="Delete a run, and what only it has.")
@RUN
@click.option(
    "--responses", "with_responses", is_flag=True, help="Also delete generated responses that no other run needs."
)
@click.option("--abandon-batches", is_flag=True, help="Also if a provider has batches to collect, which it may bill.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(run: str, with_responses: bool, abandon_batches: bool, yes: bool) -> None:
    """Delete RUN with its assignments, jobs and trainings, and its router if no other run has it.

    Responses and their scores are kept, because other runs reuse them; with --responses, only those are that another
    run has, with both prompt and teacher, or that were imported. Prompts, teachers, datasets, trained students and
    imported routers are always kept. A deletion that was interrupted continues when the command is run again.
    """
    settings = Settings.from_environment()
    with store() as database:
        with database.read() as session:
            found = lookup.any_run(session, run)  # which may be one whose deletion was interrupted
            prompts = lookup.n_prompts(session, found.id)
        also = " and the responses that no other run needs" if with_responses else ""
        if not yes and not click.confirm(f"delete run {run} ({found.state}, {prompts:,} prompts){also}?"):
            raise UsageError("nothing was deleted")
        with Meter() as meter:
            deletion = delete_run(
                database,
                found.id,
                settings.home,
                actor=owner.actor(),
                options=DeletionOptions(with_responses, abandon_batches),
                progress=meter.show,
            )
    _say(run, deletion)


def _say(run: str, deletion: Deletion) -> None:
    rows = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in deletion.deleted.items())
    click.echo(f"run {run} is deleted" + (f": {rows}" if rows else ""))
    click.echo(f"kept: {deletion.kept_responses:,} responses to its prompts, with their scores")
    if deletion.keeps_router:
        click.echo("kept: its router, because another run has it or it was imported")
    for folder in deletion.checkpoints:
        click.echo(f"removed: {folder}")
    for folder in deletion.kept_folders:
        click.echo(plain(f"kept: {folder}"))


#: The commands, which `persyn run` includes.
OF_RUN = (pause, priority, rename, delete)
