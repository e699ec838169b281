"""Tables of a run in Arrow: its prompts, responses, scores, rewards, assignments and comparison of strategies.

Rows are converted in batches: besides the table, only one batch of Python objects is in memory.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from sqlalchemy import Select, Text, and_, case, cast, select
from sqlalchemy.orm import Session

from persyn.analysis.compare import Comparison, Reward
from persyn.db import grid, lookup
from persyn.db.catalog import Prompt, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.results import Assignment, Response, Score
from persyn.method.rewards import Matrix

#: Rows converted at a time.
_ROWS = 10_000
_TURNS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))

_PROMPTS = pa.schema(
    {
        "prompt_id": pa.int64(),
        "role": pa.string(),
        "text": pa.string(),
        "history": _TURNS,
        "answer": pa.string(),
        "source": pa.string(),
        "source_id": pa.string(),
        "meta": pa.string(),
    }
)
_RESPONSES = pa.schema(
    {
        "response_id": pa.int64(),
        "prompt_id": pa.int64(),
        "teacher": pa.string(),
        "sample": pa.int64(),
        "text": pa.string(),
        "reasoning": pa.string(),
        "failure": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int64(),
        "response_tokens": pa.int64(),
        "reasoning_tokens": pa.int64(),
        "seconds": pa.float64(),
        "seed": pa.int64(),
        "engine": pa.string(),
        "origin": pa.string(),
    }
)
_SCORES = pa.schema(
    {
        "response_id": pa.int64(),
        "prompt_id": pa.int64(),
        "teacher": pa.string(),
        "sample": pa.int64(),
        "measure": pa.string(),
        "value": pa.float64(),
        "n_tokens": pa.int64(),
        "reasoning_value": pa.float64(),
        "reasoning_n_tokens": pa.int64(),
        "failure": pa.string(),
        "statistics": pa.string(),
    }
)
_ASSIGNMENTS = pa.schema(
    {
        "prompt_id": pa.int64(),
        "teacher": pa.string(),
        "score": pa.float64(),
        "margin": pa.float64(),
        "reason": pa.string(),
        "sample": pa.int64(),
        "rejected": pa.bool_(),
    }
)


def prompts(session: Session, run: Run) -> pa.Table:
    """A row for each prompt of a run, by id; `meta` is JSON."""
    query = (
        select(
            RunPrompt.prompt_id,
            RunPrompt.role,
            Prompt.text,
            Prompt.history,
            Prompt.answer,
            Prompt.source,
            Prompt.source_id,
            cast(Prompt.meta, Text),
        )
        .join(Prompt, Prompt.id == RunPrompt.prompt_id)
        .where(RunPrompt.run_id == run.id)
        .order_by(RunPrompt.prompt_id)
    )
    return _read(session, query, _PROMPTS)


def responses(session: Session, run: Run) -> pa.Table:
    """A row for each response that a run uses: those of its grid, and those to its assignments."""
    query = _of_run(
        select(
            Response.id,
            Response.prompt_id,
            Teacher.name,
            Response.sample,
            Response.text,
            Response.reasoning,
            Response.failure,
            Response.finish_reason,
            Response.prompt_tokens,
            Response.response_tokens,
            Response.reasoning_tokens,
            Response.seconds,
            Response.seed,
            Response.engine,
            Response.origin,
        ),
        run,
    )
    return _read(session, query, _RESPONSES)


def scores(session: Session, run: Run) -> pa.Table:
    """A row for each raw score of a response that a run uses; `measure` is quality or learnability.

    Where several scorers are combined, quality is the combined one, and `quality.1`, `quality.2`, ... are theirs.

    The value of learnability is the sum of log-probabilities over the `n_tokens` of the answer, in nats, and
    `reasoning_value` that over the `reasoning_n_tokens` of the reasoning; `statistics` is JSON.
    """
    named = lookup.measures(session, run)
    measure = case(*((Score.scorer_id == scorer_id, name) for scorer_id, name in named.items()))
    columns = select(
        Response.id,
        Response.prompt_id,
        Teacher.name,
        Response.sample,
        measure,
        Score.value,
        Score.n_tokens,
        Score.reasoning_value,
        Score.reasoning_n_tokens,
        Score.failure,
        cast(Score.statistics, Text),
    )
    of_run = Score.scorer_id.in_(named)
    query = _of_run(columns, run).join(Score, and_(Score.response_id == Response.id, of_run))
    return _read(session, query.order_by(measure.desc()), _SCORES)


def assignments(session: Session, run: Run) -> pa.Table:
    """A row for each assignment of a run, by prompt."""
    query = (
        select(
            Assignment.prompt_id,
            Teacher.name,
            Assignment.score,
            Assignment.margin,
            Assignment.reason,
            Assignment.sample,
            Assignment.rejected,
        )
        .join(Teacher, Teacher.id == Assignment.teacher_id)
        .where(Assignment.run_id == run.id)
        .order_by(Assignment.prompt_id)
    )
    return _read(session, query, _ASSIGNMENTS)


def rewards(session: Session, run: Run, reward: Reward | None = None) -> pa.Table:
    """A row for each cell of a run's grid, by prompt and then in head order; null where a score is missing.

    Quality and learnability are means over `responses` samples; the columns `..._error` have the standard errors of
    these and of the reward, null in a run of single samples.

    The only scored response to a prompt has no reward, see `rewards.combine`.

    reward: another definition than the run's.
    """
    reward = reward or Reward()
    cells = grid.read(session, run, **reward.measure)
    alpha, how = reward.alpha, reward.how
    rewarded, errors = cells.rewards(alpha=alpha, how=how), cells.reward_errors(alpha=alpha, how=how)
    unknown = np.full(rewarded.shape, np.nan)

    def known(error: Matrix | None, value: Matrix) -> pa.Array:
        return _numbers(unknown if errors is None or error is None else np.where(np.isnan(value), np.nan, error))

    n_prompts, n_teachers = rewarded.shape
    names = pa.array([teacher.name for teacher in lookup.teachers(session, run.id)], pa.string())
    return pa.table(
        {
            "prompt_id": np.repeat(cells.prompt_ids, n_teachers),
            "is_holdout": np.repeat(cells.is_holdout, n_teachers),
            "teacher": names.take(pa.array(np.tile(np.arange(n_teachers), n_prompts))),
            "quality": _numbers(cells.quality),
            "learnability": _numbers(cells.learnability),
            "reward": _numbers(rewarded),
            "responses": pa.array(cells.n_responses.ravel(), pa.int64()),
            "quality_error": known(cells.quality_errors, cells.quality),
            "learnability_error": known(cells.learnability_errors, cells.learnability),
            "reward_error": known(errors, rewarded),
        }
    )


def comparison(found: Comparison) -> pa.Table:
    """A row for each strategy, best first; the schema's metadata has the settings and what is unavailable."""
    intervals = "reward", "quality", "learnability", "regret", "gap_closed"
    columns: dict[str, Any] = {"strategy": pa.array([fact.strategy for fact in found.strategies], pa.string())}
    for name in intervals:
        values = [getattr(fact, name) for fact in found.strategies]
        for part, column in (("mean", name), ("low", f"{name}_low"), ("high", f"{name}_high")):
            columns[column] = pa.array([None if each is None else getattr(each, part) for each in values], pa.float64())
    for name in ("tokens", "cost"):
        columns[name] = pa.array([getattr(fact, name) for fact in found.strategies], pa.float64())
    teachers = sorted({name for fact in found.strategies for name in fact.shares})
    shares = [{name: fact.shares.get(name, 0.0) for name in teachers} for fact in found.strategies]
    columns["shares"] = pa.array(shares, pa.struct({name: pa.float64() for name in teachers}))
    settings = "run", "alpha", "normalise", "learnability", "learnability_per", "learnability_on"
    outcome = "n_holdout", "n_calibration", "notes", "is_partial"
    metadata = {name: getattr(found, name) for name in (*settings, *outcome)}
    return pa.table(columns, metadata={"persyn": msgspec.json.encode(metadata)})


def _of_run(query: Select[*tuple[Any, ...]], run: Run) -> Select[*tuple[Any, ...]]:
    """Restrict a select from `responses` and `teachers` to what a run uses, ordered by prompt and head position."""
    return (
        query.select_from(RunPrompt)
        .join(Response, Response.prompt_id == RunPrompt.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .join(Teacher, Teacher.id == Response.teacher_id)
        .outerjoin(Assignment, and_(Assignment.run_id == run.id, Assignment.prompt_id == RunPrompt.prompt_id))
        .where(RunPrompt.run_id == run.id, lookup.is_used(run))
        .order_by(RunPrompt.prompt_id, RunTeacher.position, Response.sample)
    )


def _read(session: Session, query: Select[*tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """The rows of a query whose columns are those of the schema, in its order."""
    batches = []
    for rows in session.execute(query, execution_options={"yield_per": _ROWS}).partitions():
        columns = zip(*rows, strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _numbers(matrix: Matrix) -> pa.Array:
    """The cells of a matrix, row by row; NaN becomes null."""
    return pa.array(matrix.ravel(), pa.float64(), from_pandas=True)
