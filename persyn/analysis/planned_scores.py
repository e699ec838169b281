"""The scores that a run asks for: of the calibration prompts, and of the other responses where these are scored too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, case, func, select

from persyn.config import load_config
from persyn.db.catalog import Role, Run, RunPrompt, Scorer
from persyn.db.results import Response, Score

if TYPE_CHECKING:
    from persyn.analysis.plan import Share


def per_response(run: Run, stage: str, scorers: Sequence[Scorer]) -> int:
    """How many scorers are asked about each response of a plan's stage.

    scorers: those that the run asks; imported scores are not asked for.
    """
    if stage == "calibrate":
        return len(scorers)
    is_scored = stage in ("generate", "undecided") and load_config(run.config).generation.is_scored
    return len(_of_quality(run, scorers)) if is_scored else 0


def stored(run: Run, scorers: Sequence[Scorer]) -> ColumnElement[Any]:
    """How many of these scores a response has; for a select from `run_prompts` joined to `responses`.

    One whose quality is known needs none of its other scorers.
    """
    config, of_quality = load_config(run.config), _of_quality(run, scorers)
    has_quality = _count([run.quality_scorer_id]) > 0
    quality = case((has_quality, len(of_quality)), else_=_count(of_quality))
    is_in_grid = and_(RunPrompt.role != Role.TARGET, Response.sample < config.run.samples)
    besides = quality if config.generation.is_scored else 0
    return case((is_in_grid, _count([run.learnability_scorer_id]) + quality), else_=besides)


def besides_grid(shares: Iterable[Share]) -> int:
    """An upper bound on the scores to compute of other responses than those of the calibration grid."""
    to_make: dict[str, list[int]] = {"generate": [0], "undecided": [0]}
    for share in shares:
        to_make.setdefault(share.stage, []).append(share.scores_to_make)
    return sum(to_make["generate"]) + max(to_make["undecided"])


def _of_quality(run: Run, scorers: Sequence[Scorer]) -> list[int]:
    return [scorer.id for scorer in scorers if scorer.id != run.learnability_scorer_id]


def _count(scorer_ids: Sequence[int | None]) -> Any:
    """The number of a response's scores by these scorers."""
    counted = select(func.count()).where(Score.response_id == Response.id, Score.scorer_id.in_(scorer_ids))
    return counted.scalar_subquery()
