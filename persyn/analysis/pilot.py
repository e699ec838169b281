"""Say in words what a pilot found: which definition of the reward predicts what a student becomes, and what to take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from persyn.errors import UsageError
from persyn.method import intervals, prediction
from persyn.method.intervals import Interval, Vector
from persyn.method.prediction import LEAST_STUDENTS, Outcome, Prediction, Trained
from persyn.method.rewards import Matrix
from persyn.student.pilot import Outcomes
from persyn.student.pilot_plan import By, Definition, Plan


class StudentScore(Struct, frozen=True):
    """A student of the pilot."""

    #: Who chose the responses that it was trained on: a teacher, or definitions.
    trained_on: list[str]
    score: Interval


class DefinitionFacts(Struct, frozen=True):
    """A definition of the reward, and how it predicted the students."""

    learnability: str
    alpha: float
    is_own: bool
    #: Mean reward of the responses that it chooses, and the score of the student that was trained on them.
    predicted: float
    score: Interval
    #: Rank correlation of the mean reward of each student's responses with its score; None if undefined.
    correlation: Interval | None


class PilotFacts(Struct, frozen=True):
    """What a pilot found."""

    run: str
    outcome: Outcome
    #: One sentence each: what was found, and what to do.
    says: str
    advice: str
    #: Lines for the run file that follow the advice; empty if the run's own definition is to be kept.
    run_file: str
    #: What students are judged by, and its unit.
    by: By
    unit: str
    n_learned: int
    n_asked: int
    n_seeds: int
    #: Of the student before training.
    untrained: Interval
    #: The best first.
    students: list[StudentScore]
    #: By correlation, the highest first.
    definitions: list[DefinitionFacts]
    #: Lower bound of the best definition's correlation, and upper bound of all, which hold for all at once.
    low: float
    high: float
    #: Teachers and definitions that are left out, with the reason.
    left_out: dict[str, str]


def facts(plan: Plan, outcomes: Outcomes) -> PilotFacts:
    """Judge the definitions of a plan by what its students became."""
    measured, before = _measured(plan, outcomes)
    predicted = plan.predicted()
    units = np.array([choice.unit for choice in plan.choices])
    found = prediction.judge(Trained(predicted, measured, units, plan.own))
    scores = [_interval(row) for row in measured]
    definitions = list(plan.definitions)
    place = {name: n for n, choice in enumerate(plan.choices) for name in choice.names}
    rows = [
        DefinitionFacts(
            learnability=each.learnability,
            alpha=each.alpha,
            is_own=n == plan.own,
            predicted=float(predicted[n, place[str(each)]]),
            score=scores[place[str(each)]],
            correlation=found.correlations[n],
        )
        for n, each in enumerate(definitions)
    ]
    taken = _taken(found, measured, plan.own, [place[str(each)] for each in definitions])
    students = [StudentScore(choice.names, score) for choice, score in zip(plan.choices, scores, strict=True)]
    return PilotFacts(
        run=plan.run,
        outcome=found.outcome,
        says=_sentence(found, definitions, len(scores)),
        advice=_advice(found, definitions, plan.own, taken),
        run_file="" if taken == plan.own else _run_file(definitions[taken]),
        by=plan.by,
        unit="nats per token" if plan.by == "likelihood" else "quality",
        n_learned=len(plan.learn_ids),
        n_asked=measured.shape[1],
        n_seeds=plan.settings.seeds,
        untrained=_interval(before[0]),
        students=sorted(students, key=lambda each: -each.score.mean),
        definitions=sorted(rows, key=_by_correlation, reverse=True),
        low=found.low,
        high=found.high,
        left_out=dict(plan.left_out),
    )


def _measured(plan: Plan, outcomes: Outcomes) -> tuple[Matrix, Matrix]:
    """(M, A) scores of the students and (1, A) of the untrained one, on the prompts for which all of them have one.

    Raises `UsageError` if there is none.
    """
    values, untrained = outcomes.quality, outcomes.untrained_quality
    if plan.by == "likelihood" or values is None or untrained is None:
        values, untrained = outcomes.likelihood, outcomes.untrained_likelihood
    scores, before = over_seeds(values), over_seeds(untrained)
    known = ~np.isnan(scores).any(axis=0) & ~np.isnan(before).any(axis=0)
    if not known.any():
        what = "no response of a student was scored" if plan.by == "quality" else "no asked prompt has a right response"
        raise UsageError(
            f"the pilot of run {plan.run} has nothing to judge its students by: {what}; try the other --by"
        )
    return scores[:, known], before[:, known]


def over_seeds(values: NDArray[np.float64]) -> Matrix:
    """(M, A) means of (M, S, A) scores over the seeds that have one; NaN without any."""
    count = (~np.isnan(values)).sum(axis=1)
    return np.asarray(np.divide(np.nansum(values, axis=1), count, out=np.full(count.shape, np.nan), where=count > 0))


def _interval(values: Vector) -> Interval:
    """The mean over prompts with its bootstrap interval."""
    drawn = np.concatenate([piece @ values for piece in intervals.weights(len(values), seed=0)]) / len(values)
    return intervals.interval(float(values.mean()), drawn)


def _taken(found: Prediction, measured: Matrix, own: int, students: Sequence[int]) -> int:
    """The definition to take: the best one if it predicts better than the run's own, and its student is not worse.

    students: (D,) of each definition.
    """
    if found.outcome != "predicts" or found.gain.low <= 0:
        return own
    more = _interval(measured[students[found.best]] - measured[students[own]])
    return found.best if more.high >= 0 else own


def _sentence(found: Prediction, definitions: Sequence[Definition], n_students: int) -> str:
    best, correlation = definitions[found.best], found.correlations[found.best]
    among = f"{len(definitions)} definitions and {n_students} students"
    match found.outcome, found.reason:
        case "predicts", _:
            assert correlation is not None
            return (
                f"{best} predicts best: the more it rewards the responses, the better the student (rank correlation "
                f"{correlation.mean:+.2f}, at least {found.low:+.2f} also as the best of {among})"
            )
        case "no definition predicts", _:
            return (
                f"no definition predicts what the student becomes: the students differ, but every rank correlation is "
                f"below {found.high:+.2f} ({among})"
            )
        case _, "few students":
            return (
                f"cannot tell: {n_students} different students are too few for a rank correlation, which needs "
                f"{LEAST_STUDENTS}; compare more weights (--alpha) or definitions"
            )
        case _, "no difference":
            return (
                "cannot tell: the students differ by no more than the choice of the asked prompts explains; ask more "
                "prompts (--asked), or teach more (--prompts, --epochs, --learning-rate)"
            )
    return (
        f"cannot tell: the best rank correlation, of {best}, is between {found.low:+.2f} and {found.high:+.2f} as one "
        f"of {among}; more prompts (--asked, --prompts), seeds (--seeds) and teachers narrow it"
    )


def _advice(found: Prediction, definitions: Sequence[Definition], own: int, taken: int) -> str:
    yours = definitions[own]
    if taken != own:
        gain = f"{found.gain.mean:+.2f} (at least {found.gain.low:+.2f})"
        return f"take {definitions[taken]}: its rank correlation is {gain} above that of yours, {yours}"
    if found.outcome == "predicts" and found.best == own:
        return f"keep yours, {yours}"
    return f"keep yours, {yours}: none is shown to predict better, with a student that is no worse"


def _run_file(definition: Definition) -> str:
    learnability = f'learnability = "{definition.learnability}"\n' if definition.alpha else ""
    return f"[run]\n{learnability}alpha = {definition.alpha:g}\n"


def _by_correlation(row: DefinitionFacts) -> tuple[float, bool]:
    return -2.0 if row.correlation is None else row.correlation.mean, row.is_own
