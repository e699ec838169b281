"""Say in words whether routing pays in a run, and what was decided on it."""

from __future__ import annotations

from msgspec import Struct
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.grid import Grid
from persyn.errors import UsageError
from persyn.method.intervals import Interval
from persyn.method.verdict import FEW, LEAST, WORTHWHILE, WORTHWHILE_AT_LEAST, Verdict
from persyn.stages import outcomes
from persyn.stages import verdict as stored
from persyn.stages.registry import ASSIGN


class RunVerdict(Struct, frozen=True):
    """Whether routing pays in a run."""

    run: str
    #: One sentence.
    says: str
    #: What a reader must know about it.
    warnings: list[str]
    #: What was decided, in a sentence; None before it was, and in a run that always routes.
    decided: str | None
    #: None where there is none; then `says` has the reason.
    verdict: Verdict | None


def facts(session: Session, run: Run, *, by: str | None = None) -> RunVerdict:
    """Judge a run; raise `UsageError` when there is no verdict, and when no prompt has the field `by`."""
    return _said(session, run, stored.of_run(session, run, by=by))


def if_any(session: Session, run: Run, cells: Grid) -> RunVerdict | None:
    """The verdict of a run, or the reason why there is none; None in a run that has no router.

    cells: the run's grid.
    """
    if run.router_id is None or not stored.is_about(run):
        return None
    try:
        return _said(session, run, stored.of_run(session, run, cells=cells))
    except UsageError as error:
        return RunVerdict(run.name, str(error), [], _decided(session, run), None)


def _said(session: Session, run: Run, found: Verdict) -> RunVerdict:
    return RunVerdict(run.name, sentence(found), warnings(found), _decided(session, run), found)


def sentence(found: Verdict) -> str:
    """The verdict in one sentence."""
    gain = (
        f"the router's expected gain over the best single teacher, {found.teacher}, is {between(found.gain)} of "
        "reward per prompt"
    )
    match found.outcome:
        case "route":
            return (
                f"route: {gain}, and {between(found.total, '{:+,.0f}')} over the remaining {found.n_prompts:,} prompts"
            )
        case "do not route":
            return (
                f"do not route, use teacher {found.teacher}: {gain}, likely below {found.worthwhile:.3f}, the least "
                f"that is worth it ({WORTHWHILE:.0%} of the gap between that teacher and the oracle, and at least "
                f"{WORTHWHILE_AT_LEAST:.0%} of the range of rewards)"
            )
        case "cannot tell" if found.n_measured < LEAST:
            return f"cannot tell: {gain}; fewer than {LEAST} prompts never tell, and {FEW:,} or more are better"
        case "cannot tell":
            return f"cannot tell: {gain}; about {found.more:,} more calibration prompts are likely to tell"


def between(interval: Interval, form: str = "{:+.3f}") -> str:
    """A mean with its interval."""
    mean, low, high = (form.format(value) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} (95%: {low} to {high})"


def warnings(found: Verdict) -> list[str]:
    """What weakens the verdict, or changes how its figures are read."""
    said = []
    if found.n_calibration < FEW:
        said.append(
            f"measured on {found.n_measured:,}{_of(found)} calibration prompts: with fewer than about {FEW:,}, a "
            "router has not learned all that it could, and more may change the verdict"
        )
    if found.is_near_tie:
        said.append(
            f"near-tie: {found.teacher} leads {found.second} by {between(found.lead)}; either may be the best single "
            "teacher, and the share of the gap that is closed looks larger than what routing gains"
        )
    if found.no_group is not None:
        said.append(
            f"no figures by group: {found.no_group!r} is not a group, since it has different values on more than half "
            "of the prompts; --by groups by another field"
        )
    return said


def _of(found: Verdict) -> str:
    return f" of {found.n_calibration:,}" if found.n_measured < found.n_calibration else ""


def _decided(session: Session, run: Run) -> str | None:
    decision = stored.decision(session, run)
    if decision is None:
        return None
    on = "without a verdict" if decision.verdict == "none" else f"on the verdict {decision.verdict!r}"
    best = next(each.name for each in lookup.teachers(session, run.id) if each.id == decision.ranking[0])
    if load_config(run.config).strategy.is_limited:
        return _decided_within(session, run, on, "" if decision.routes else best)
    if decision.routes:
        return f"decided {on}: the router assigns the remaining prompts"
    return f"decided {on}: all remaining prompts are assigned to {best}"


def _decided_within(session: Session, run: Run, on: str, instead: str) -> str | None:
    """What was decided within limits; instead: the teacher that the verdict is for, where it is not to route."""
    made, limits = outcomes.last(session, run), "the remaining prompts, within the limits of [strategy]"
    if made is None:
        return f"decided: the scores of all prompts assign {limits}" if run.stage == ASSIGN else None
    if not made.slope:
        return f"decided{f' {on}' if made.by_verdict else ''}: the teachers' mean rewards assign {limits}"
    though = f"; the verdict is about {instead} answering all of them, without costs and limits" if instead else ""
    return f"decided: the router's scores, as far as they predict rewards, assign {limits}{though}"
