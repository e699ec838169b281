"""The transitions of a run between its stages and to its end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.config import RunConfig, load_config
from persyn.db import bulk, lookup, outages
from persyn.db.catalog import Run, RunState
from persyn.db.connect import take_time
from persyn.db.results import Assignment
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState
from persyn.errors import UsageError
from persyn.ingest import prompt_import
from persyn.ingest.versions import Identities
from persyn.jobs import queue
from persyn.jobs.queue import Claim
from persyn.llm import quality
from persyn.runs import budgets, prices, router_fields, run_file, same_run, start, transport
from persyn.stages import drift, limits, registry, score
from persyn.stages.batch import Progress
from persyn.stages.registry import STAGES

#: Why failed rows of the grid are not retried later.
FINAL = "failed rows of the calibration grid are final once prompts have been assigned without them"
#: A stage that still misses rows after its jobs are done is planned again, up to this often per round in total.
_MAX_PLANS = 3
_OPEN = (JobState.QUEUED, JobState.RUNNING)


def start_run(
    session: Session,
    config: RunConfig,
    *,
    actor: str,
    known: Identities | None = None,
    on_rows: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Return the run of this configuration; create it with its prompts and first jobs if it does not exist.

    Starting twice returns the same run. Raises `UsageError` when the name is taken by another configuration, a model
    does not exist, or a prompt file has an invalid row; then nothing is written.

    known:   `start.identities` of the configuration, computed outside the transaction because it may take long.
    on_rows: called from time to time with the number of prompt rows read.
    say:     called with each notice for the user.
    """
    if (found := start.find(session, config)) is not None:
        for each in _find_again(session, found, config, actor=actor):
            if say:
                say(each)
        return found
    start.require_imported(session, config)
    known = start.identities(config) if known is None else known
    run = enlist(session, config, known, on_rows=on_rows, say=say)
    _note(session, run, actor, None, RunState.RUNNING, {"stage": run.stage})
    advance(session, run.id, actor=actor)
    return run


def _find_again(session: Session, run: Run, config: RunConfig, *, actor: str) -> list[str]:
    """Adopt the current paths of a run's files, and recompute scores whose missing prompt fields are present now.

    Returns notices about the files for the user.
    """
    transport.change(session, run, config, actor=actor)
    if budgets.change(session, run, config, actor=actor) and run.state is RunState.RUNNING:
        queue.go_on(session, run.id, run.stage, actor=actor)
    if budgets.is_used_up(run):  # if nothing has changed, it stops again
        resume(session, run, actor=actor)
    paths = [Path(file) for file in config.prompts.files]
    away = [path.name for path in paths if not path.is_file()]
    conflicts = 0
    if not away and not same_run.is_unchanged(load_config(run.config), paths):
        # the same conversations may have reference answers now
        conflicts = prompt_import.import_prompts(session, paths).conflicts
    same_run.adopt(session, run, config, with_content=not conflicts)
    prices.note(session, run, config, [teacher.id for teacher in lookup.teachers(session, run.id)])
    if score.forget_mended(session, run) and run.state is RunState.DONE:
        resume(session, run, actor=actor)
    said = [f"file not found: {', '.join(away)}; the run keeps its prompts"] if away else []
    return [*said, *_of_conflicts(config, conflicts)]


def _of_conflicts(config: RunConfig, count: int) -> list[str]:
    names = ", ".join(Path(file).name for file in config.prompts.files)
    return [same_run.other_answers(names, count)] if count else []


def enlist(
    session: Session,
    config: RunConfig,
    known: Identities,
    *,
    on_rows: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Create a run with its models and prompts, and draw its calibration prompts; plan no jobs."""
    run = start.create(session, config, known, stage=next(iter(STAGES)))
    conflicts = prompt_import.add_to_run(session, run.id, config.prompts, progress=on_rows)
    start.require_schemas(session, run)
    need = quality.need(config)
    said = prompt_import.draw(
        session,
        run.id,
        calibration=run_file.n_calibration(config),
        holdout=run_file.holdout(config),
        seed=config.run.seed,
        need=need,
    )
    said += router_fields.check(session, run)
    said += limits.require(session, run)
    start.require_texts(session, run)
    if config.generation.is_scored and need and (count := prompt_import.unscorable(session, run.id, need)):
        said.append(prompt_import.not_scored(count, need, config.generation))
    for each in (*said, *_of_conflicts(config, conflicts)):
        if say:
            say(each)
    return run


def resume(session: Session, run: Run, *, actor: str) -> None:
    """Continue a failed, cancelled or paused run by retrying its failed jobs; a running one just continues.

    A finished or failed run goes back to a stage that misses a row: a shared response that failed was deleted or
    replaced since, or a score failed for want of a field that the prompt has now.
    """
    run = lookup.whole(session, run.id)
    score.forget_mended(session, run)
    is_over = run.state in (RunState.DONE, RunState.FAILED)
    is_behind = is_over and _go_back(session, run)
    if run.state is not RunState.DONE or is_behind:
        _go_on(session, run, actor, {})


def _go_back(session: Session, run: Run) -> bool:
    """Move a run back to the first stage that misses a row; return whether there is one."""
    for name, counts in progress(session, run).items():
        if counts.pending:
            run.stage = name
            return True
    return False


def _go_on(session: Session, run: Run, actor: str, detail: dict[str, Any]) -> None:
    for name in outages.forget(session, run.id):
        queue.postpone(session, run.id, name, None)
    queue.retry(session, run.id, run.stage, actor=actor)
    drift.resume(session, run, actor=actor)
    if run.state is not RunState.RUNNING:
        _note(session, run, actor, run.state, RunState.RUNNING, {"stage": run.stage, **detail})
        run.state, run.error, run.finished_at, run.plans = RunState.RUNNING, None, None, 0
        session.flush()
    advance(session, run.id, actor=actor)


def retry(session: Session, run: Run, *, actor: str) -> None:
    """Retry a run's failed and cancelled jobs; raise `UsageError` when the run is done and has none."""
    if run.state is RunState.DONE:
        raise UsageError(f"run {run.name} is done and has no failed or cancelled jobs to retry")
    resume(session, run, actor=actor)


def retry_rows(session: Session, run: Run, reasons: Collection[str], *, actor: str) -> int:
    """Delete rows of a run that failed for these reasons and continue the run; return the number of rows.

    Until the run is assigned, these are responses and scores of the grid; afterwards, responses to assigned prompts.
    The run returns to the first stage that misses a row. Other runs that share a deleted response miss it too, until it
    is generated again or they are resumed. Imported rows are kept. Raises `UsageError` while the run is running, and
    when no row failed for these reasons.
    """
    run = lookup.whole(session, run.id)
    if run.state is RunState.RUNNING:
        raise UsageError(f"run {run.name} is running; retry its failed rows when it has ended")
    rows = score.forget_mended(session, run, reasons)
    stages = needed(session, run)
    deleters = (STAGES[name].forget for name in stages)
    rows += sum(delete(session, run, reasons) for delete in deleters if delete is not None)
    if not rows:
        final = "" if registry.ASSIGN in stages else f"; {FINAL}"
        raise UsageError(f"run {run.name} has no failed row to retry for {', '.join(reasons)}{final}")
    _go_back(session, run)
    _go_on(session, run, actor, {"reason": "retry", "rows": rows, "failures": sorted(reasons)})
    return rows


def needed(session: Session, run: Run) -> tuple[str, ...]:
    """The stages whose failed rows a run needs: the earlier ones until prompts are assigned, then the later ones."""
    is_assigned = select(Assignment.prompt_id).where(Assignment.run_id == run.id).limit(1)
    of_grid = registry.reached(registry.ASSIGN)
    is_over = registry.ASSIGN in registry.reached(run.stage) or session.scalars(is_assigned).first() is not None
    return tuple(name for name in STAGES if name not in of_grid) if is_over else of_grid


def go_back_to(session: Session, run: Run, stage: str, *, actor: str, detail: dict[str, Any]) -> None:
    """Continue a locked run, done or running, from a stage for which it has more prompts, unless it is not as far."""
    was, before = run.state, run.stage
    run.stage = before if before in registry.reached(stage) else stage
    _note(session, run, actor, was, RunState.RUNNING, {"from_stage": before, "stage": run.stage, **detail})
    run.state, run.finished_at, run.plans = RunState.RUNNING, None, 0
    session.flush()
    advance(session, run.id, actor=actor)


def cancel(session: Session, run: Run, *, actor: str) -> None:
    """Stop a run: none of its jobs is claimed any more, and finished results are kept.

    Raises `UsageError` if the run is done or has failed.
    """
    queue.cancel(session, run.id, actor=actor)  # locks the jobs: before the run, as when a worker saves results
    run = lookup.whole(session, run.id)
    if run.state in (RunState.DONE, RunState.FAILED):
        raise UsageError(f"run {run.name} is {run.state} already and cannot be cancelled")
    if run.state is not RunState.CANCELLED:
        _note(session, run, actor, run.state, RunState.CANCELLED, {"stage": run.stage})
        run.state, run.finished_at = RunState.CANCELLED, now()


def advance(session: Session, run_id: int, *, actor: str) -> None:
    """Advance a run as far as possible: if its stage has no open job, plan what is missing here or in the next stage.

    Called in the transaction that ended a job, under a lock on the run, so that the run continues whichever process
    dies. A stage is complete when planning finds nothing missing: every row is then done or failed.
    """
    run = lookup.locked(session, run_id)
    while run.state is RunState.RUNNING and not _count(session, run, _OPEN):
        take_time(session)
        if _count(session, run, (JobState.FAILED,)):
            finish(session, run, RunState.FAILED, actor, _failure(session, run))
        elif (why := queue.halted(session, run.id, run.stage)) is not None:
            finish(session, run, RunState.PAUSED, actor, why)
        elif (jobs := _plan(session, run, actor)) is None:
            return
        elif jobs:
            _count_plan(session, run, actor)
        elif (following := registry.following(run.stage)) is None:
            finish(session, run, RunState.DONE, actor, None)
        else:
            _note(session, run, actor, run.state, run.state, {"from_stage": run.stage, "stage": following})
            run.stage, run.plans = following, 0
            session.flush()


def _plan(session: Session, run: Run, actor: str) -> int | None:
    """Plan a run's stage; None if that is impossible: the run has failed, and keeps what was done before.

    Raises `UsageError` where nothing was done, so that the run is not started.
    """
    try:
        with session.begin_nested():
            return STAGES[run.stage].plan(session, run)
    except UsageError as error:
        if session.scalars(select(Job.id).where(Job.run_id == run.id).limit(1)).first() is None:
            raise
        finish(session, run, RunState.FAILED, actor, f"stage {run.stage}: {error}")
        return None


def complete(session: Session, job: Claim, *, owner: str) -> None:
    """Complete a job whose results are all written, create the jobs that follow from them, and advance the run."""
    is_completed, follow = queue.complete(session, job, owner=owner), STAGES[job.stage].follow
    run = lookup.locked(session, job.run_id)  # or two workers would each leave it to the other to create jobs
    if is_completed and follow is not None and run.state is RunState.RUNNING:
        follow(session, run, job)
    advance(session, job.run_id, actor=owner)


def wait_out(session: Session, job: Claim, error: str, *, owner: str) -> bool:
    """Release a job whose server is unavailable: its queue pauses for this run, and no attempt is counted.

    Returns False when the run has waited for `outage_seconds`: then the job and all waiting jobs of its queue have
    failed.
    """
    if queue.stop_cancelled(session, job, owner=owner):
        advance(session, job.run_id, actor=owner)
        return True
    if queue.release_turned(session, job, owner=owner):
        return True
    run = session.get_one(Run, job.run_id)
    limit = timedelta(seconds=load_config(run.config).run.outage_seconds)
    pause = outages.note(session, job.run_id, job.queue, error, limit=limit)
    if pause is None:
        waited = f"waited {limit.total_seconds():,.0f} s (outage_seconds); " if limit else ""
        give_up(session, job, f"{waited}{error}", owner=owner)
        return False
    queue.release(session, job, owner=owner)
    queue.postpone(session, job.run_id, job.queue, pause)
    return True


def answered(session: Session, job: Claim) -> None:
    """Record that a job's model returned results, which ends the pause of its queue."""
    if outages.over(session, job.run_id, job.queue):
        queue.postpone(session, job.run_id, job.queue, None)


def give_up(session: Session, job: Claim, error: str, *, owner: str) -> None:
    """Fail a job permanently, with all waiting jobs of its queue in its run, and advance the run.

    A job that was moved to another queue is only released.
    """
    if queue.release_turned(session, job, owner=owner):
        return
    if queue.fail(session, job, error, owner=owner, is_final=True) is not None:
        queue.fail_waiting(session, job, error, owner=owner)
        advance(session, job.run_id, actor=owner)


def halt(session: Session, job: Claim, why: str, *, owner: str) -> None:
    """Stop the jobs of a model in a stage because a budget is used up; the run pauses when no other job is open.

    A job that was moved to another queue is only released.
    """
    if not queue.release_turned(session, job, owner=owner) and queue.halt(session, job, why, owner=owner):
        advance(session, job.run_id, actor=owner)


def cancel_jobs(session: Session, run: Run, job_ids: Collection[int], *, actor: str) -> int:
    """Cancel jobs, whether waiting or running; missing rows are planned again when the stage's other jobs have ended.

    Returns how many of them were waiting or running.
    """
    cancelled = queue.cancel(session, run.id, actor=actor, job_ids=job_ids)
    run.plans = 0  # the user asked for another plan, so it does not count against the limit
    session.flush()
    advance(session, run.id, actor=actor)
    return cancelled


def sweep(session: Session, *, actor: str, dead_owners: Collection[str] = (), spare_expired: bool = False) -> int:
    """Requeue or fail the jobs of lost workers, and advance the runs that this affects; return the number of jobs."""
    swept = queue.sweep(session, actor=actor, dead_owners=dead_owners, spare_expired=spare_expired)
    for run_id in sorted({job.run_id for job in swept if job.state is not JobState.QUEUED}):
        advance(session, run_id, actor=actor)
    return len(swept)


def progress(session: Session, run: Run, *, known: Collection[str] = ()) -> dict[str, Progress]:
    """The counts of each stage that the run has reached, in order."""
    return {name: STAGES[name].progress(session, run) for name in registry.reached(run.stage) if name not in known}


def _count_plan(session: Session, run: Run, actor: str) -> None:
    """Fail a run whose stage still misses rows although its jobs are done, so that planning cannot loop forever."""
    run.plans += 1
    session.flush()
    limit = _MAX_PLANS * STAGES[run.stage].rounds(run)
    if run.plans > limit:
        queue.cancel(session, run.id, actor=actor)
        reason = f"stage {run.stage} still has missing rows after its jobs were completed {limit} times"
        finish(session, run, RunState.FAILED, actor, reason)


def finish(session: Session, run: Run, state: RunState, actor: str, error: str | None) -> None:
    """Move a run to a state in which it is not worked any more."""
    _note(session, run, actor, run.state, state, {"stage": run.stage} | ({"error": error} if error else {}))
    run.state, run.error = state, error
    run.finished_at = now()
    session.flush()


def _count(session: Session, run: Run, states: Sequence[JobState]) -> int:
    counted = select(func.count()).where(Job.run_id == run.id, Job.stage == run.stage, Job.state.in_(states))
    return session.scalars(counted).one()


def _failure(session: Session, run: Run) -> str:
    job_id, error = session.execute(
        select(Job.id, Job.error)
        .where(Job.run_id == run.id, Job.stage == run.stage, Job.state == JobState.FAILED)
        .order_by(Job.id)
        .limit(1)
    ).one()
    return f"stage {run.stage}, job {job_id}: {error}"


def _note(
    session: Session, run: Run, actor: str, was: RunState | None, state: RunState, detail: dict[str, Any]
) -> None:
    event = {"actor": actor, "run_id": run.id, "from_state": was, "to_state": state, "detail": detail}
    bulk.insert_new(session, Event, [event])
