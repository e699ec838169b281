"""Score each response of the grid: its quality, and its learnability under the student."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, and_, delete, func, literal, or_, select
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, load_config
from persyn.db import bulk, combined, lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Scorer
from persyn.db.results import Response, Score
from persyn.db.text import reason
from persyn.jobs.queue import Claim
from persyn.llm.engines import ENGINES
from persyn.stages import combining, scoring
from persyn.stages.batch import Batch, Done, JobPlan, Progress, make_jobs
from persyn.stages.stage import Stage

#: Scores deleted per statement.
_CHUNK = 1_000


def plan(session: Session, run: Run) -> int:
    """Create jobs for every missing score and return their number; a missing imported score is stored as a failure."""
    n_teachers = session.scalars(select(func.count()).where(RunTeacher.run_id == run.id)).one()
    config = load_config(run.config).run
    size = max(1, config.job_prompts // (n_teachers * config.samples))
    if not run.plans:  # only at first: a field that is still missing must not hold the run in this stage
        forget_mended(session, run)
    scorers = lookup.asked(session, run)
    for scorer in scorers:
        if scorer.kind == IMPORTED:
            _note_absent(session, run, scorer.id)
    combined.refresh(session, run)
    made = 0
    for scorer in scorers:
        if scorer.kind != IMPORTED:
            plan = JobPlan(run.id, "score", scoring.spec_in(session, run, scorer), scorer_id=scorer.id, size=size)
            made += make_jobs(session, plan, _missing(session, run, scorer.id))
    return made


def load(session: Session, job: Claim) -> Batch:
    """Read the responses to the job's prompts that its scorer has not scored."""
    assert job.scorer_id is not None
    return scoring.load(session, job, _missing(session, session.get_one(Run, job.run_id), job.scorer_id))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store scores, and the qualities that follow from them."""
    scoring.save(session, job, done)
    run = session.get_one(Run, job.run_id)
    combining.store(session, run, _responses(run).where(Response.id.in_([item.request.id for item in done])))


def progress(session: Session, run: Run) -> Progress:
    """Count the scores that the grid's responses should have, by outcome."""
    total, judged, failed = session.execute(
        _owed(run).with_only_columns(func.count(), func.count(Score.value), func.count(Score.failure))
    ).one()
    return Progress(total, judged, failed)


def _expected(session: Session, run: Run) -> int:
    n_texts = session.scalars(select(func.count()).select_from(_responses(run).subquery())).one()
    return n_texts * len(set(lookup.scorers(run)))


def failures(run: Run) -> Select[Any]:
    """Select the failure reason of each failed score in the grid."""
    return _owed(run).with_only_columns(Score.failure).where(Score.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Delete the grid's scores that failed for these reasons, so that they are computed again; return their number.

    Imported scores are kept, and those that no quality depends on, because a gate has decided.
    """
    responses = _responses(run).with_only_columns(Response.id)
    undecided = responses.where(combining.is_undecided(session, run))
    scorers = [scorer.id for scorer in lookup.asked(session, run) if scorer.kind != IMPORTED]
    of_student = and_(Score.scorer_id == run.learnability_scorer_id, Score.response_id.in_(responses))
    failed = Score.scorer_id.in_(scorers), reason(Score.failure).in_(reasons)
    is_needed = or_(of_student, Score.response_id.in_(undecided))
    deleted = session.execute(delete(Score).where(*failed, is_needed).returning(Score.response_id)).all()
    combining.forget_stale(session, run, _responses(run))
    return len(deleted)


def forget_mended(session: Session, run: Run, reasons: Collection[str] | None = None) -> int:
    """Delete scores that failed for want of something that is there now; return their number.

    It is a field of the prompt or, for a quality of several scorers, a score of one of them.

    reasons: only failures for these reasons; None means all.
    """
    mended = sum(_forget_mended(session, run, scorer, reasons) for scorer in lookup.quality_scorers(session, run))
    return combining.forget_stale(session, run, _responses(run)) or mended


def _forget_mended(session: Session, run: Run, scorer: Scorer, reasons: Collection[str] | None) -> int:
    need = ENGINES.require(scorer.kind, "scorer").need(scorer.options)
    if need is None:
        return 0
    wanted = set(need.failures if reasons is None else need.failures & set(reasons))
    failed = session.execute(
        _responses(run)
        .join(Score, and_(Score.response_id == Response.id, Score.scorer_id == scorer.id))
        .join(Prompt, Prompt.id == Response.prompt_id)
        .where(reason(Score.failure).in_(wanted))
        .with_only_columns(Response.id, Prompt.answer, Prompt.meta)
    )
    mended = [row.id for row in failed if need.is_met(row.answer, row.meta)]
    for start in range(0, len(mended), _CHUNK):
        part = mended[start : start + _CHUNK]
        session.execute(delete(Score).where(Score.scorer_id == scorer.id, Score.response_id.in_(part)))
    return len(mended)


def _owed(run: Run) -> Select[Any]:
    """Select the scores that the grid's responses should have, present or missing."""
    return (
        _responses(run)
        .join(Scorer, Scorer.id.in_(lookup.scorers(run)))
        .outerjoin(Score, and_(Score.response_id == Response.id, Score.scorer_id == Scorer.id))
    )


def _responses(run: Run) -> Select[Any]:
    """Select the grid's responses that have a text."""
    return (
        select(Response.prompt_id)
        .select_from(RunPrompt)
        .join(Response, Response.prompt_id == RunPrompt.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .where(
            RunPrompt.run_id == run.id,
            RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT)),
            Response.sample < load_config(run.config).run.samples,
            Response.text.is_not(None),
        )
    )


def _missing(session: Session, run: Run, scorer_id: int) -> Select[Any]:
    return _responses(run).where(combining.is_wanted(session, run, scorer_id))


def _note_absent(session: Session, run: Run, scorer_id: int) -> None:
    rows = _missing(session, run, scorer_id).with_only_columns(
        Response.id,
        literal(scorer_id),
        literal("not_imported: no score of this response was imported"),
        literal({}, Score.detail.type),
    )
    bulk.insert_found(session, Score, ("response_id", "scorer_id", "failure", "detail"), rows)


STAGE = Stage(
    name="score",
    style=("orange", "--"),
    plan=plan,
    load=load,
    spec=scoring.spec,
    save=save,
    progress=progress,
    expected=_expected,
    failures=failures,
    rounds=combining.rounds,
    counts_results=lambda run: len(load_config(run.config).scorers) == 1,
    forget=forget,
)
