"""Say in words what costs and limits did to a run's assignment, and what a little more of each would be worth."""

from __future__ import annotations

from sqlalchemy.orm import Session

from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.stages import outcomes
from persyn.stages.limits import DOLLARS, TOKENS
from persyn.stages.outcomes import Outcome, TeacherLimits

#: One more of a unit of cost, in words.
_ONE_MORE = {DOLLARS: "one more US dollar", TOKENS: "1,000 more response tokens"}


def sentences(session: Session, run: Run) -> list[str]:
    """What was decided within the limits of [strategy]; empty without them, and before prompts are assigned."""
    if not (recorded := outcomes.of_run(session, run)):
        return []
    *earlier, found = recorded
    names = {teacher.id: teacher.name for teacher in lookup.teachers(session, run.id)}
    before = sum(each.prompts for each in earlier)
    said = [f"the last {found.prompts:,} prompts were assigned within what {before:,} others left"] if before else []
    said += [_result(found), *([_budget(found)] if found.budget is not None else [])]
    said += [each for part in found.teachers for each in _of_teacher(names[part.teacher_id], part)]
    return [*said, _scores(found)]


def amount(value: float, unit: str) -> str:
    """An amount of a unit of cost in words."""
    if unit == DOLLARS:
        return f"${value:,.2f}" if value >= 0.1 or not value else f"${value:.2g}"
    return f"{value * 1000:,.0f} response tokens"


def _result(found: Outcome) -> str:
    reward, free = found.reward / found.prompts, found.free_reward / found.prompts
    cost = "" if found.cost is None else f", for {amount(found.cost, found.unit)}"
    free_cost = "" if found.free_cost is None else f", for {amount(found.free_cost, found.unit)}"
    return (
        f"within limits: an expected reward of {reward:.3f} per prompt over {found.prompts:,} prompts{cost}; without "
        f"costs and limits, {free:.3f}{free_cost}, and {found.moved:,} prompts would have another teacher"
    )


def _budget(found: Outcome) -> str:
    assert found.budget is not None
    of = f"the budget of {amount(found.budget, found.unit)}"
    if not found.price:
        return f"{of} does not bind"
    return f"{of} binds: {_ONE_MORE[found.unit]} would buy {found.price:.3g} of expected reward"


def _of_teacher(name: str, part: TeacherLimits) -> list[str]:
    if part.price > 0:
        return [f"the limit of {part.most:,} prompts for {name} binds: one more is worth {part.price:.3g} of reward"]
    if part.price < 0:
        return [f"the least of {part.least:,} prompts for {name} binds: one fewer is worth {-part.price:.3g} of reward"]
    return []


def _scores(found: Outcome) -> str:
    if found.fitted is None or found.error is None:
        return "expected rewards are the teachers' means on the calibration prompts"
    measured = f"measured {found.fitted:.3g}, standard error {found.error:.2g}"
    if not found.slope:
        return (
            f"the router's scores are of no measured use beyond the teachers' means, which alone decide ({measured} of "
            "reward per unit of log-odds)"
        )
    return f"a unit of the router's scores (log-odds) counts as {found.slope:.3g} of reward ({measured})"
