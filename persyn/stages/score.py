"""Score each response of the grid: its quality, and its learnability under the student."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Select, and_, delete, func, literal, select
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, load_config
from persyn.db import bulk
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Scorer
from persyn.db.results import Response, Score
from persyn.db.text import reason
from persyn.jobs.queue import Claim
from persyn.llm import transport
from persyn.llm.engines import ENGINES
from persyn.llm.identity import hub_revision
from persyn.llm.protocols import Failed, Judge, Judged, ModelSpec
from persyn.stages.batch import TURNS, Batch, Done, JobPlan, Progress, conversation, in_part, make_jobs, to_wire
from persyn.stages.stage import Stage

#: Scores deleted per statement.
_CHUNK = 1_000


def plan(session: Session, run: Run) -> int:
    """Create jobs for every missing score and return their number; a missing imported score is stored as a failure."""
    n_teachers = session.scalars(select(func.count()).where(RunTeacher.run_id == run.id)).one()
    size = max(1, run.config["run"]["job_prompts"] // n_teachers)
    if not run.plans:  # only at first: a field that is still missing must not hold the run in this stage
        forget_mended(session, run)
    made = 0
    for scorer_id in (run.learnability_scorer_id, run.quality_scorer_id):
        scorer = session.get_one(Scorer, scorer_id)
        if scorer.kind == IMPORTED:
            _note_absent(session, run.id, scorer.id)
            continue
        plan = JobPlan(run.id, "score", spec_in(run, scorer), scorer_id=scorer.id, size=size)
        made += make_jobs(session, plan, _missing(run.id, scorer.id))
    return made


def load(session: Session, job: Claim) -> Batch:
    """Read the responses to the job's prompts that its scorer has not scored."""
    scorer = session.get_one(Scorer, job.scorer_id)
    rows = session.execute(
        in_part(_missing(job.run_id, scorer.id), job)
        .join(Prompt, Prompt.id == Response.prompt_id)
        .add_columns(Response.id, Response.text.label("response"), Response.reasoning, Response.tool_calls)
        .add_columns(*TURNS, Prompt.tools, Prompt.answer, Prompt.meta)
    )
    reads_row = ENGINES.require(scorer.kind, "scorer").reads_row
    requests = [
        Judge(
            id=row.id,
            messages=conversation(row),
            response=row.response,
            reasoning=row.reasoning,
            tools=row.tools,
            tool_calls=row.tool_calls,
            answer=row.answer,
            meta=to_wire(row.meta) if reads_row else {},
        )
        for row in rows
    ]
    return Batch(spec_in(session.get_one(Run, job.run_id), scorer), list(requests))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the raw values; saving twice leaves one row per score."""
    bulk.insert_new(session, Score, [_row(job, item) for item in done])


def progress(session: Session, run: Run) -> Progress:
    """Count the scores that the grid's responses should have, by outcome."""
    total, judged, failed = session.execute(
        _owed(run).with_only_columns(func.count(), func.count(Score.value), func.count(Score.failure))
    ).one()
    return Progress(total, judged, failed)


def _expected(session: Session, run: Run) -> int:
    n_texts = session.scalars(select(func.count()).select_from(_responses(run.id).subquery())).one()
    return n_texts * len({run.quality_scorer_id, run.learnability_scorer_id})


def failures(run: Run) -> Select[Any]:
    """Select the failure reason of each failed score in the grid."""
    return _owed(run).with_only_columns(Score.failure).where(Score.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Delete the grid's scores that failed for these reasons, so that they are computed again; return their number.

    Imported scores are kept.
    """
    of_run = _responses(run.id).with_only_columns(Response.id)
    is_used = Scorer.id.in_((run.learnability_scorer_id, run.quality_scorer_id))
    scorers = select(Scorer.id).where(is_used, Scorer.kind != IMPORTED)
    failed = Score.scorer_id.in_(scorers), Score.response_id.in_(of_run), reason(Score.failure).in_(reasons)
    return len(session.execute(delete(Score).where(*failed).returning(Score.response_id)).all())


def forget_mended(session: Session, run: Run, reasons: Collection[str] | None = None) -> int:
    """Delete scores that failed because a prompt lacked a field that it has now; return their number.

    reasons: only failures for these reasons; None means all.
    """
    scorer = session.get_one(Scorer, run.quality_scorer_id)
    need = ENGINES.require(scorer.kind, "scorer").need(scorer.options)
    if need is None:
        return 0
    wanted = set(need.failures if reasons is None else need.failures & set(reasons))
    failed = session.execute(
        _responses(run.id)
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
    scorers = (run.learnability_scorer_id, run.quality_scorer_id)
    return (
        _responses(run.id)
        .join(Scorer, Scorer.id.in_(scorers))
        .outerjoin(Score, and_(Score.response_id == Response.id, Score.scorer_id == Scorer.id))
    )


def spec_in(run: Run, scorer: Scorer) -> ModelSpec:
    """The model to load for a run's scorer."""
    config = load_config(run.config)
    table = config.student if scorer.id == run.learnability_scorer_id else config.quality
    return spec_of(scorer, model=table.model, gpus=table.gpus, options=table.options)


def spec_of(scorer: Scorer, *, model: str, gpus: int, options: Mapping[str, Any]) -> ModelSpec:
    """The model to load for a scorer, given where and how its model is reached.

    options: those of which the transport is used.
    """
    reference = ENGINES.require(scorer.kind, "scorer").reference(scorer.options)
    revisions = {"weights": hub_revision(scorer.revision), "function": scorer.revision}
    return ModelSpec(
        engine=scorer.kind,
        model=model,
        revision=revisions.get(reference),
        gpus=gpus,
        options=transport.join(scorer.options, scorer.kind, options),
    )


def _responses(run_id: int) -> Select[Any]:
    """Select the grid's responses that have a text."""
    return (
        select(Response.prompt_id)
        .select_from(RunPrompt)
        .join(Response, Response.prompt_id == RunPrompt.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run_id, RunTeacher.teacher_id == Response.teacher_id))
        .where(
            RunPrompt.run_id == run_id,
            RunPrompt.role.in_((Role.CALIBRATION, Role.HOLDOUT)),
            Response.sample == 0,
            Response.text.is_not(None),
        )
    )


def _missing(run_id: int, scorer_id: int) -> Select[Any]:
    judged = and_(Score.response_id == Response.id, Score.scorer_id == scorer_id)
    return _responses(run_id).outerjoin(Score, judged).where(Score.response_id.is_(None))


def _note_absent(session: Session, run_id: int, scorer_id: int) -> None:
    rows = _missing(run_id, scorer_id).with_only_columns(
        Response.id,
        literal(scorer_id),
        literal("not_imported: no score of this response was imported"),
        literal({}, Score.detail.type),
    )
    bulk.insert_found(session, Score, ("response_id", "scorer_id", "failure", "detail"), rows)


def _row(job: Claim, item: Done) -> dict[str, Any]:
    row: dict[str, Any] = {
        "response_id": item.request.id,
        "scorer_id": job.scorer_id,
        "value": None,
        "n_tokens": None,
        "reasoning_value": None,
        "reasoning_n_tokens": None,
        "failure": None,
        "detail": {"engine": item.engine},
        "job_id": job.id,
    }
    if isinstance(item.result, Failed):
        row["failure"] = item.result.reason
        return row
    assert isinstance(item.result, Judged)
    if not math.isfinite(item.result.value):
        row["failure"] = f"not_finite: the score is {item.result.value}"
    else:
        row["value"] = item.result.value
        row["n_tokens"] = item.result.n_tokens
        row["reasoning_value"] = item.result.reasoning_value
        row["reasoning_n_tokens"] = item.result.reasoning_n_tokens
        row["detail"] = {"engine": item.engine, **item.result.detail}
    return row


STAGE = Stage(
    name="score",
    style=("orange", "--"),
    plan=plan,
    load=load,
    spec=lambda session, run, scorer_id: spec_in(run, session.get_one(Scorer, scorer_id)),
    save=save,
    progress=progress,
    expected=_expected,
    failures=failures,
    forget=forget,
)
