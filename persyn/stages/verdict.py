"""The verdict of a run: does routing pay? Read from the store, and decided on once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, structs
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import grid, lookup, notes
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.grid import Grid
from persyn.db.results import Router, RouterScore
from persyn.errors import UsageError
from persyn.jobs import owner
from persyn.method import rewards
from persyn.method.rewards import Matrix
from persyn.method.strategies import STRATEGIES
from persyn.method.verdict import Evidence, Verdict, best_first, is_group, judge
from persyn.stages.labels import LABELLED, SOURCE, labels

#: Weights of learnability at which the leading teacher is shown.
ALPHAS = (0.0, 0.2, 0.4, 0.6, 1.0)
#: Stands for a prompt without the field that prompts are grouped by.
_NONE = "(none)"
#: Of the events' detail: a decision, and a recalibration, which ends it.
_KEY, RECALIBRATED = "decided", "recalibrated"
#: Ways of tuning after which a router is not fitted again without each fold, which would take as long again each time.
_TUNED = ("full", "lora")


class Decision(Struct, frozen=True):
    """What was decided on a run's verdict, as its event records it."""

    #: `route`, `do not route`, `cannot tell`, or `none`.
    verdict: str
    #: Why there is none.
    why: str | None
    #: Whether the router assigns the remaining prompts, or the best single teacher answers all of them.
    routes: bool
    #: Teachers by their mean reward, the best first; the next one answers where an imported response is missing.
    ranking: list[int]

    @property
    def reason(self) -> str:
        """The reason of an assignment to the best single teacher."""
        return f"verdict: {self.verdict}"


def of_run(session: Session, run: Run, *, by: str | None = None, cells: Grid | None = None) -> Verdict:
    """Judge whether routing pays, as far as the run has come.

    by:    the field of the prompts' rows, or `source`, to group them by. Default: the first field in `[router]
           features`, or the source where there are several.
    cells: the run's grid, if it was read already.
    Raises `UsageError` when there is nothing to judge by, with the reason, and when no prompt has the field.
    """
    config, cells = load_config(run.config), cells or grid.read(session, run)
    scores = unseen_scores(session, run, cells)
    field = by or next(iter(config.router.features), SOURCE)
    found = _groups(session, run, field)
    groups = found if len(set(found)) > 1 and is_group(found) else None
    if by is not None and (why := _why_no_group(found)):
        raise UsageError(f"the calibration prompts of run {run.name!r} cannot be grouped by {by!r}: {why}")
    alphas = {alpha: cells.rewards(alpha=alpha) for alpha in (ALPHAS if cells.has_learnability else (0.0,))}
    evidence = Evidence(
        teachers=[teacher.name for teacher in lookup.teachers(session, run.id)],
        rewards=cells.rewards(),
        scores=scores,
        n_prompts=_n_targets(session, run),
        groups=groups,
        alphas={alpha: found for alpha, found in alphas.items() if not np.isnan(found).all()},
    )
    try:
        return structs.replace(judge(evidence), no_group=None if is_group(found) else field)
    except ValueError as error:
        raise UsageError(f"run {run.name!r} has no verdict: {error}") from error


def decide(session: Session, run: Run) -> Decision | None:
    """Return what was decided for a run; decide now, and record it, if nothing was. None: the run always routes.

    The decision and what follows from it are of one transaction, and an earlier one is never changed: not by a worker
    that resumes the run, and not when a response of the grid is replaced. Only a recalibration leads to another one.
    """
    when_unsure = load_config(run.config).strategy.when_unsure
    if when_unsure is None:  # started before there were verdicts
        return None
    if (found := decision(session, run)) is not None:
        return found
    verdict, why = "none", None
    try:
        verdict = of_run(session, run).outcome
    except UsageError as error:
        why = str(error)
    return record(session, run, verdict, why, _ranking(session, run))


def record(session: Session, run: Run, verdict: str, why: str | None, ranking: list[int]) -> Decision:
    """Decide on a verdict, by what the run does when it is unsure, and record it.

    ranking: the teachers' ids, best first.
    """
    when_unsure = load_config(run.config).strategy.when_unsure
    routes = verdict == "route" or (when_unsure == "route" and verdict != "do not route")
    made = Decision(verdict, why, routes, ranking)
    notes.note(session, run, {_KEY: msgspec.to_builtins(made)}, actor=owner.actor())
    return made


def decision(session: Session, run: Run) -> Decision | None:
    """What was decided on a run's router, if it has come so far; each recalibration fits another one."""
    found = notes.noted(session, run, _KEY, since=RECALIBRATED)
    return msgspec.convert(found[0], Decision) if found else None


def _ranking(session: Session, run: Run) -> list[int]:
    """The teachers' ids, best first, by the rewards of all prompts that the verdict is based on."""
    cells = grid.read(session, run)
    order = best_first(rewards.static_ranking(cells.rewards()))
    return [int(cells.teacher_ids[column]) for column in order]


def is_about(run: Run) -> bool:
    """Whether a run is one that a verdict can be about: one whose prompts a router assigns."""
    kind = STRATEGIES.get(load_config(run.config).strategy.kind)  # none if its package is not installed any more
    return kind is not None and kind.decided_by == "router"


def unseen_scores(session: Session, run: Run, cells: Grid) -> Matrix:
    """(P, K) scores of the grid's prompts by a router that was not fitted to the prompt; NaN where there are none.

    A tuned backbone, and a router of an earlier version, have them for the hold-out alone.

    Raises `UsageError` when there cannot be any, and when no calibration prompt has one although its router is not a
    tuned backbone.
    """
    config, none = load_config(run.config), f"run {run.name!r} has no verdict: "
    if not is_about(run):
        raise UsageError(f"{none}its strategy is {config.strategy.name}, and a verdict is about a router")
    if run.router_id is None:
        raise UsageError(f"{none}it has no router yet")
    if config.router.fitted is not None:
        raise UsageError(f"{none}its router was imported, and it has no calibration prompts to judge it by")
    seen, unseen = scores_of(session, run, run.router_id, cells)
    is_tuned = session.get_one(Router, run.router_id).tune in _TUNED
    if np.isnan(unseen).all() and not is_tuned and not cells.is_holdout.any():
        raise UsageError(
            f"{none}its router was fitted by an earlier version, which did not cross-fit it (score each calibration "
            "prompt by a router fitted without it), and it has no hold-out"
        )
    return np.where(cells.is_holdout[:, None], seen, unseen)


def scores_of(session: Session, run: Run, router_id: int, cells: Grid) -> tuple[Matrix, Matrix]:
    """(P, K) scores of the grid's prompts by a router, and cross-fitted ones; NaN where there are none."""
    place = {prompt_id: row for row, prompt_id in enumerate(cells.prompt_ids.tolist())}
    column = {teacher_id: k for k, teacher_id in enumerate(cells.teacher_ids.tolist())}
    scores, unseen = np.full(cells.quality.shape, np.nan), np.full(cells.quality.shape, np.nan)
    found = session.execute(
        select(RouterScore.prompt_id, RouterScore.teacher_id, RouterScore.score, RouterScore.cross_fitted)
        .join(RunPrompt, RunPrompt.prompt_id == RouterScore.prompt_id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET, RouterScore.router_id == router_id)
    )
    for prompt_id, teacher_id, score, cross_fitted in found:
        where = place[prompt_id], column[teacher_id]
        scores[where] = score
        unseen[where] = np.nan if cross_fitted is None else cross_fitted
    return scores, unseen


def _n_targets(session: Session, run: Run) -> int:
    of_run = select(func.count()).where(RunPrompt.run_id == run.id, RunPrompt.role == Role.TARGET)
    return session.scalars(of_run).one()


def _why_no_group(found: Sequence[str]) -> str:
    """Why the labels of prompts that a user chose to group by make no groups; empty if they do."""
    if set(found) == {_NONE}:
        return "none of them has such a field"
    if not is_group(found):
        return (
            f"it has {len(set(found)):,} different values on {len(found):,} prompts; take a field whose values repeat"
        )
    return ""


def _groups(session: Session, run: Run, field: str) -> Sequence[str]:
    """The label of each prompt of the grid."""
    prompts: Sequence[Any] = session.execute(
        select(*LABELLED)
        .select_from(Prompt)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET)
        .order_by(RunPrompt.prompt_id)
    ).all()
    return [labels(prompt, [field])[field] or _NONE for prompt in prompts]
