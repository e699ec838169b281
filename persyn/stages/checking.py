"""Score responses for quality while generation goes on.

When a job of a teacher ends, its responses are scored by a job that follows it. Responses that were there before, such
as another run's, are scored by jobs that the stage plans. What a teacher that became worse leads to is in `drift`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import CompoundSelect, Select, delete, or_, select, union
from sqlalchemy.orm import Session

from persyn.db import lookup
from persyn.db.catalog import Run, Scorer
from persyn.db.results import Assignment, Response, Score
from persyn.db.text import reason
from persyn.db.work import Job, JobState
from persyn.jobs.queue import Claim
from persyn.stages import answers, combining, drift, rejection, scoring
from persyn.stages.batch import Batch, Done, JobPlan, make_jobs
from persyn.stages.stage import Stage

_OPEN = (JobState.QUEUED, JobState.RUNNING)
_HALTED = (JobState.FAILED, JobState.CANCELLED)


def checked(stage: Stage) -> Stage:
    """A stage that writes the responses of assigned prompts, with their quality."""

    def plan(session: Session, run: Run) -> int:
        drift.begin(session, run)
        made = stage.plan(session, run)
        size = run.config["run"]["job_prompts"]
        for scorer in lookup.quality_scorers(session, run):
            jobs = JobPlan(run.id, stage.name, scoring.spec_in(session, run, scorer), scorer_id=scorer.id, size=size)
            made += make_jobs(session, jobs, unscored(session, run, scorer))
        return made

    def load(session: Session, job: Claim) -> Batch:
        if job.scorer_id is None:
            return stage.load(session, job)
        run, scorer = session.get_one(Run, job.run_id), session.get_one(Scorer, job.scorer_id)
        return scoring.load(session, job, _in_job(unscored(session, run, scorer), run, job))

    def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
        assert stage.forget is not None
        return _forget_scores(session, run, reasons) + stage.forget(session, run, reasons)

    return replace(
        stage,
        plan=plan,
        load=load,
        spec=rejection.spec,
        save=_save,
        follow=_follow,
        forget=forget,
        rounds=lambda run: 1 + combining.rounds(run),
        counts_results=lambda run: False,
    )


def _save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    if job.scorer_id is None:
        answers.save(session, job, done)
        return
    scoring.save(session, job, done)
    of_these = Response.id.in_([item.request.id for item in done])
    combining.store(session, session.get_one(Run, job.run_id), select(Response.prompt_id).where(of_these))


def _follow(session: Session, run: Run, job: Claim) -> None:
    if job.scorer_id is not None:
        drift.watch(session, run, job)
    _have_scored(session, run, job)


def _have_scored(session: Session, run: Run, job: Claim) -> None:
    """Have the responses of a job scored; of several scorers, the gates first, then the others about what passed."""
    written_by = job.id if job.scorer_id is None else job.follows_job_id
    if written_by is None or (job.scorer_id is not None and combining.rounds(run) == 1):
        return  # nothing follows scores that all scorers are asked for at once
    of_stage = Job.run_id == run.id, Job.stage == job.stage
    is_open = select(Job.id).where(*of_stage, Job.state.in_(_OPEN), Job.follows_job_id == written_by).limit(1)
    if session.scalars(is_open).first() is not None:
        return
    size = run.config["run"]["job_prompts"]
    between = session.execute(select(Job.first_prompt_id, Job.last_prompt_id).where(Job.id == written_by)).one()
    # The range lets the database find the few prompts without reading all of the run's.
    mine = Response.job_id == written_by, Assignment.prompt_id.between(*between)
    # A scorer that has failed, or was halted, gets no more jobs until the run is resumed: the plan makes them.
    halted = set(session.scalars(select(Job.scorer_id).where(*of_stage, Job.state.in_(_HALTED)).distinct()))
    for scorer in lookup.quality_scorers(session, run):
        if scorer.id not in halted:
            spec = scoring.spec_in(session, run, scorer)
            jobs = JobPlan(run.id, job.stage, spec, scorer_id=scorer.id, size=size, follows_job_id=written_by)
            make_jobs(session, jobs, unscored(session, run, scorer).where(*mine))


def unscored(session: Session, run: Run, scorer: Scorer) -> Select[Any]:
    """Select the responses of the dataset that a scorer has to score."""
    return _written(run).where(combining.is_wanted(session, run, scorer.id))


def _written(run: Run) -> Select[Any]:
    rows = lookup.with_rows(select(Assignment.prompt_id).select_from(Assignment), run)
    return rows.where(Assignment.run_id == run.id, Response.text.is_not(None))


def _in_job(owed: Select[Any], run: Run, job: Claim) -> Select[Any]:
    """Those of the job that is followed; without one, those that no other open job will have scored."""
    if job.follows_job_id is not None:
        return owed.where(Response.job_id == job.follows_job_id)
    others = Job.run_id == run.id, Job.stage == job.stage, Job.state.in_(_OPEN), Job.id != job.id
    followed = select(Job.follows_job_id).where(*others, Job.follows_job_id.is_not(None))
    left: CompoundSelect[Any] = union(select(Job.id).where(*others), followed)
    return owed.where(or_(Response.job_id.is_(None), Response.job_id.not_in(left)))


def _forget_scores(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Delete the failed scores of responses for these reasons, so that they are computed again; return their number."""
    scorers = [scorer.id for scorer in lookup.quality_scorers(session, run)]
    undecided = _written(run).where(combining.is_undecided(session, run)).with_only_columns(Response.id)
    failed = Score.scorer_id.in_(scorers), reason(Score.failure).in_(reasons), Score.response_id.in_(undecided)
    deleted = session.execute(delete(Score).where(*failed).returning(Score.response_id)).all()
    combining.forget_stale(session, run, _written(run))
    return len(deleted)
