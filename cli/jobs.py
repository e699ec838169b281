"""`persyn jobs`: list, retry and cancel the jobs of a run."""

from __future__ import annotations

from typing import Any

import click
from sqlalchemy import select

from persyn.cli.context import ID, JSON, LIMIT, RUN, find_run, show, store
from persyn.db.work import Job, JobState
from persyn.errors import UsageError
from persyn.jobs import owner
from persyn.runs import pipeline


@click.group()
def jobs() -> None:
    """List, retry and cancel a run's jobs."""


@jobs.command(short_help="Retry failed and cancelled jobs.")
@RUN
@click.option(
    "--rows",
    "reasons",
    metavar="REASON",
    multiple=True,
    help="Also retry rows that failed for REASON, as shown by 'persyn run status'. May be repeated.",
)
def retry(run: str, reasons: tuple[str, ...]) -> None:
    """Requeue the failed and cancelled jobs of RUN; workers continue the run.

    A failed row is finished, and is not retried unless its reason is given: --rows server_error
    after an outage. Without workers, continue the run with 'persyn run resume RUN'.
    """
    with store() as database, database.write() as session:
        found = find_run(session, run)
        if reasons:
            rows = pipeline.retry_rows(session, found, reasons, actor=owner.actor())
            click.echo(f"{rows:,} rows will be computed again")
        else:
            pipeline.retry(session, found, actor=owner.actor())
    click.echo(f"run {run} continues; 'persyn run status {run}' shows its progress")


@jobs.command(short_help="Cancel jobs, including running ones.")
@RUN
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True, type=ID)
def cancel(run: str, job_ids: tuple[int, ...]) -> None:
    """Cancel jobs of RUN, waiting or running; their missing rows are planned again later."""
    with store() as database, database.write() as session:
        found = find_run(session, run)
        known = set(session.scalars(select(Job.id).where(Job.run_id == found.id, Job.id.in_(job_ids))))
        if strange := [str(job_id) for job_id in job_ids if job_id not in known]:
            raise UsageError(f"run {run} has no job {', '.join(strange)}; 'persyn jobs list {run}' lists its jobs")
        cancelled = pipeline.cancel_jobs(session, found, job_ids, actor=owner.actor())
    click.echo(f"{cancelled} of {len(job_ids)} waiting or running jobs were cancelled")


@jobs.command("list")
@RUN
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--limit", default=50, show_default=True, type=LIMIT, help="Number of newest jobs to show.")
@JSON
def list_jobs(run: str, state: str | None, limit: int, as_json: bool) -> None:
    """List the jobs of RUN, the newest first."""
    columns = (Job.id, Job.stage, Job.queue, Job.state, Job.n_prompts, Job.attempts, Job.fence, Job.owner, Job.error)
    with store() as database, database.read() as session:
        query = select(*columns).where(Job.run_id == find_run(session, run).id).order_by(Job.id.desc()).limit(limit)
        found = session.execute(query.where(Job.state == state) if state else query).all()
    rows: list[tuple[Any, ...]] = [tuple(row) for row in found]
    if not as_json:
        place = [column.key for column in columns].index("owner")
        rows = [(*row[:place], row[place] and owner.short(row[place]), *row[place + 1 :]) for row in rows]
    show([column.key for column in columns], rows, as_json=as_json)
