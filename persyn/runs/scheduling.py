"""Whether and when a run's jobs are claimed: pause a run while it is worked, and set its priority among runs."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.orm import Session

from persyn.db import lookup, notes
from persyn.db.catalog import Run, RunState
from persyn.db.work import Job, JobState
from persyn.errors import UsageError, shorten
from persyn.jobs import queue
from persyn.runs import budgets, pipeline

#: Priorities are from minus this to this.
MOST_PRIORITY = 1000


def pause(session: Session, run: Run, *, actor: str, why: str | None = None) -> None:
    """Stop a run until `pipeline.resume`: none of its jobs is claimed, and no result is lost.

    A worker that holds a job sends no further requests from its next heartbeat on, saves the results of those in
    flight, and gives the job back. Raises `UsageError` for a run that is not running.

    why: shown with the state, beside who paused it.
    """
    run = lookup.whole(session, run.id)
    if run.state is not RunState.RUNNING:
        reason = f": {run.error}" if run.state is RunState.PAUSED else ""
        raise UsageError(f"run {run.name} is {run.state}{reason}; only a running run can be paused")
    pipeline.finish(session, run, RunState.PAUSED, actor, f"by {actor}" + (f": {shorten(why)}" if why else ""))


def how_to_continue(run: Run) -> str:
    """What continues a paused run."""
    if budgets.is_used_up(run):
        return "raise [budget] in the run's file and start it again: persyn run start FILE"
    return f"persyn run resume {run.name}"


def prioritise(session: Session, run: Run, priority: int, *, actor: str) -> None:
    """Set a run's priority: jobs of runs with a higher one are claimed first; jobs that are held are not interrupted.

    Raises `UsageError` for a value that is not allowed.
    """
    if not isinstance(priority, int) or not -MOST_PRIORITY <= priority <= MOST_PRIORITY:
        raise UsageError(f"a priority is an integer from {-MOST_PRIORITY} to {MOST_PRIORITY}, got {priority!r}")
    queue.queues(session, run.id)  # locks the jobs: before the run, as when a worker saves results
    run = lookup.whole(session, run.id)
    if run.priority == priority:
        return
    detail = {"priority": priority, "was": run.priority}
    notes.note(session, run, detail, actor=actor)
    run.priority = priority
    session.execute(
        update(Job)
        .where(Job.run_id == run.id, Job.state != JobState.DONE)
        .values(priority=-priority)
        .execution_options(synchronize_session=False)
    )
    session.flush()
