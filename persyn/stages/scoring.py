"""Have scorers score responses: what the stages score and generate share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select
from sqlalchemy.orm import Session

from persyn.config import QualityTable, StudentTable, load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Prompt, Run, Scorer
from persyn.db.results import Response, Score
from persyn.jobs.queue import Claim, ModelJobs
from persyn.llm import transport
from persyn.llm.engines import ENGINES
from persyn.llm.identity import hub_revision
from persyn.llm.protocols import Failed, Judge, Judged, ModelSpec
from persyn.stages.batch import TURNS, Batch, Done, conversation, in_part, to_wire


def load(session: Session, job: Claim, missing: Select[Any]) -> Batch:
    """Build the requests of one job.

    missing: selects the prompt ids of the responses that the job's scorer has not scored, from `responses`.
    """
    scorer = session.get_one(Scorer, job.scorer_id)
    rows = session.execute(
        in_part(missing, job)
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
    return Batch(spec_in(session, session.get_one(Run, job.run_id), scorer), list(requests))


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the raw values; saving twice leaves one row per score."""
    bulk.insert_new(session, Score, [_row(job, item) for item in done])


def spec(session: Session, run: Run, of: ModelJobs) -> ModelSpec:
    """The model that jobs of a scorer load."""
    return spec_in(session, run, session.get_one(Scorer, of.scorer_id))


def spec_in(session: Session, run: Run, scorer: Scorer) -> ModelSpec:
    """The model to load for a run's scorer."""
    config = load_config(run.config)
    table: StudentTable | QualityTable
    if config.student is not None and scorer.id == run.learnability_scorer_id:
        table = config.student
    else:
        table = config.scorers[lookup.quality_scorers(session, run).index(scorer)]
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


def _row(job: Claim, item: Done) -> dict[str, Any]:
    row: dict[str, Any] = {
        "response_id": item.request.id,
        "scorer_id": job.scorer_id,
        "value": None,
        "n_tokens": None,
        "reasoning_value": None,
        "reasoning_n_tokens": None,
        "statistics": None,
        "failure": None,
        "detail": {"engine": item.engine},
        "job_id": job.id,
    }
    if isinstance(item.result, Failed):
        row["failure"] = item.result.reason
        return row
    assert isinstance(item.result, Judged)
    if (unfit := _not_finite(item.result)) is not None:
        row["failure"] = f"not_finite: {unfit}"
    else:
        row["value"] = item.result.value
        row["n_tokens"] = item.result.n_tokens
        row["reasoning_value"] = item.result.reasoning_value
        row["reasoning_n_tokens"] = item.result.reasoning_n_tokens
        row["statistics"] = item.result.statistics
        row["detail"] = {"engine": item.engine, **item.result.detail}
    return row


def _not_finite(found: Judged) -> str | None:
    """What of a result the store cannot hold; None if it is finite."""
    if not math.isfinite(found.value):
        return f"the score is {found.value}"
    parts = (found.statistics or {}).items()
    return next(
        (f"{name} of the {part} is {n}" for part, of in parts for name, n in of.items() if not math.isfinite(n)), None
    )
