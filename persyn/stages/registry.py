"""The stages of a run in their order."""

from __future__ import annotations

from collections.abc import Mapping

from persyn.stages import assign, calibrate, fit_router, generate, score
from persyn.stages.stage import Stage

STAGES: Mapping[str, Stage] = {
    stage.name: stage for stage in (calibrate.STAGE, score.STAGE, fit_router.STAGE, assign.STAGE, generate.STAGE)
}
#: The stage after which the rows of earlier stages are no longer needed.
ASSIGN = assign.STAGE.name


def reached(stage: str) -> tuple[str, ...]:
    """The stages up to this one."""
    order = tuple(STAGES)
    return order[: order.index(stage) + 1]


def following(stage: str) -> str | None:
    """The stage after this one; None for the last."""
    order = tuple(STAGES)
    place = order.index(stage) + 1
    return order[place] if place < len(order) else None
