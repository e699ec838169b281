"""`persyn jobs`: the pieces of a run's work."""

from __future__ import annotations

import click
from sqlalchemy import select

from cli.open import JSON, find_run, show, store
from persyn.db.work import Job, JobState


@click.group()
def jobs() -> None:
    """Look at the pieces of a run's work."""


@jobs.command("list")
@click.argument("run")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="The newest so many.")
@JSON
def list_jobs(run: str, state: str | None, limit: int, as_json: bool) -> None:
    """List the jobs of RUN, the newest first."""
    columns = (Job.id, Job.stage, Job.queue, Job.state, Job.n_prompts, Job.attempts, Job.fence, Job.owner, Job.error)
    with store() as database, database.read() as session:
        query = select(*columns).where(Job.run_id == find_run(session, run).id).order_by(Job.id.desc()).limit(limit)
        rows = session.execute(query.where(Job.state == state) if state else query).all()
    show([column.key for column in columns], rows, as_json=as_json)
