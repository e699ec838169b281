"""Quality combined from several scorers: derived from their scores, and stored as a score once they decide it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, delete, exists, select
from sqlalchemy.orm import Session, aliased

from persyn.config import COMBINED
from persyn.db import bulk, lookup
from persyn.db.catalog import Run, RunPrompt, RunTeacher, Scorer
from persyn.db.results import Response, Score
from persyn.method import combined_quality

#: Responses read, and scores deleted, at once.
_CHUNK = 1_000


class Combined(NamedTuple):
    """The scorer of a combined quality: its id, and the ids and weights of its parts; a gate has no weight."""

    id: int
    parts: list[int]
    weights: list[float | None]

    @property
    def gates(self) -> list[int]:
        """The ids of the gates."""
        return [part for part, weight in zip(self.parts, self.weights, strict=True) if weight is None]


def of_run(session: Session, run: Run) -> Combined | None:
    """The combined quality of a run; None where one scorer is the quality."""
    scorer = session.get_one(Scorer, run.quality_scorer_id)
    return _read(session, scorer) if scorer.kind == COMBINED else None


def follow(session: Session, scorer_ids: Collection[int], response_ids: Sequence[int]) -> None:
    """Update all combined qualities of responses that have new scores of these scorers."""
    responses = select(Response.prompt_id).where(Response.id.in_(response_ids))
    for scorer in session.scalars(select(Scorer).where(Scorer.kind == COMBINED).order_by(Scorer.id)).all():
        if set((found := _read(session, scorer)).parts) & set(scorer_ids):
            forget_stale(session, found, responses)
            store(session, found, responses)


def refresh(session: Session, run: Run) -> None:
    """Update the quality of all responses to a run's prompts by its teachers.

    These are also responses outside the grid, and those without a text: scores of both can be imported.
    """
    if (found := of_run(session, run)) is None:
        return
    responses = (
        select(Response.prompt_id)
        .select_from(RunPrompt)
        .join(Response, Response.prompt_id == RunPrompt.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .where(RunPrompt.run_id == run.id)
    )
    forget_stale(session, found, responses)
    store(session, found, responses)


def store(session: Session, found: Combined, responses: Select[Any]) -> None:
    """Store the quality of responses whose scores decide it.

    responses: selects from `responses`. A response that has its quality keeps it.
    """
    missing, last = responses.where(~has(found.id)).with_only_columns(Response.id), 0
    while ids := session.scalars(missing.where(Response.id > last).order_by(Response.id).limit(_CHUNK)).all():
        last, rows = ids[-1], []
        for response_id, scores in _scores(session, found, responses.where(Response.id.in_(ids))):
            outcome = _outcome(found, scores)
            if outcome is not None:
                detail = {"values": [scores[part].value if part in scores else None for part in found.parts]}
                rows.append({"response_id": response_id, "scorer_id": found.id, **outcome, "detail": detail})
        bulk.insert_new(session, Score, rows)


def forget_stale(session: Session, found: Combined, responses: Select[Any]) -> int:
    """Delete failed qualities that do not follow from the scores any more, because some were deleted or replaced.

    responses: as in `store`.
    Returns their number.
    """
    failed = aliased(Score)
    has_failed = exists().where(
        failed.response_id == Response.id, failed.scorer_id == found.id, failed.failure.is_not(None)
    )
    now = dict(_scores(session, found, responses.where(has_failed)))
    there = session.scalars(responses.where(has_failed).with_only_columns(Response.id)).all()
    outcomes = {response_id: _outcome(found, now.get(response_id, {})) for response_id in there}
    stale = [response_id for response_id, outcome in outcomes.items() if not (outcome or {}).get("failure")]
    for start in range(0, len(stale), _CHUNK):
        part = stale[start : start + _CHUNK]
        session.execute(delete(Score).where(Score.scorer_id == found.id, Score.response_id.in_(part)))
    return len(stale)


def has(scorer_id: int, *, at_least: float | None = None) -> ColumnElement[bool]:
    """Whether a response has a score, or a value that is high enough."""
    score = aliased(Score)
    is_high = [] if at_least is None else [score.value >= at_least]
    return exists().where(score.response_id == Response.id, score.scorer_id == scorer_id, *is_high)


def _read(session: Session, scorer: Scorer) -> Combined:
    parts = lookup.parts(session, scorer)
    return Combined(scorer.id, [part.id for part in parts], [part["weight"] for part in scorer.options["parts"]])


class _Part(NamedTuple):
    kind: str
    value: float | None
    failure: str | None


def _scores(session: Session, found: Combined, responses: Select[Any]) -> Iterable[tuple[int, dict[int, _Part]]]:
    """Yield the scores of each response by those of the parts that scored it."""
    of_parts = and_(Score.response_id == Response.id, Score.scorer_id.in_(found.parts))
    columns = Response.id, Score.scorer_id, Scorer.kind, Score.value, Score.failure
    query = responses.join(Score, of_parts).join(Scorer, Scorer.id == Score.scorer_id).with_only_columns(*columns)
    rows = session.execute(query.order_by(Response.id)).all()
    for response_id, of_response in groupby(rows, key=lambda row: row.id):
        yield response_id, {row.scorer_id: _Part(row.kind, row.value, row.failure) for row in of_response}


def _outcome(found: Combined, scores: dict[int, _Part]) -> dict[str, Any] | None:
    """The value of a quality, or why there is none; None while it depends on a score that is missing."""
    values = [scores[part].value if part in scores else None for part in found.parts]
    value = combined_quality.combine(found.weights, values)
    if value is not None and math.isfinite(value):
        return {"value": value, "failure": None}
    if value is not None:
        return {"value": None, "failure": "not_finite: the weighted sum of the scores is too large"}
    if any(gate not in scores for gate in found.gates):
        return None  # it may not be passed, and the others would not count
    others = [part for part in found.parts if part not in found.gates]
    return _failure(scores, found.gates) or _failure(scores, others)


def _failure(scores: dict[int, _Part], parts: Sequence[int]) -> dict[str, Any] | None:
    """The failure of the first part that failed, if all were asked; its code comes first, as in the part's own."""
    if any(part not in scores for part in parts):
        return None
    failed = next((scores[part] for part in parts if scores[part].failure), None)
    if failed is None or failed.failure is None:
        return None
    code, _, detail = failed.failure.partition(": ")
    return {"value": None, "failure": f"{code}: {failed.kind}" + (f": {detail}" if detail else "")}
