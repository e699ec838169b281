"""Compare strategies by the evaluations of students that were trained on their runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Run, Scorer, Student
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.errors import UsageError
from persyn.method import intervals
from persyn.method.intervals import Interval

#: The scorer whose values are sums over tokens: the mean is taken over tokens and negated to give a loss.
_LIKELIHOOD = "log_likelihood"
#: The student before any training.
UNTRAINED = "untrained"


class StudentFacts(Struct, frozen=True):
    """The results of students trained on runs of one strategy, by one measure."""

    student: str
    #: The names of the evaluation prompts' files.
    prompts: str
    #: The kind of scorer.
    by: str
    strategy: str
    #: None for the student before training.
    alpha: float | None
    #: The training settings, without the seed.
    training: str | None
    n_trainings: int
    n_prompts: int
    #: Values that could not be computed; they are excluded.
    n_failed: int
    #: Mean value; for log_likelihood the loss in nats per token, where lower is better.
    value: Interval | None
    #: Improvement over the student before training, if that was evaluated; above 0 is better.
    gain: Interval | None
    #: For log_likelihood, exp(value); None if that overflows.
    perplexity: float | None = None


_Key: TypeAlias = tuple[str, float | None, str | None, str]
"""Strategy, alpha, training settings, and a digest of all else in which runs differ that are not seeds of one."""

_BEFORE: _Key = (UNTRAINED, None, None, "")


@dataclass(frozen=True, slots=True)
class _Values:
    """(S, P) numerators and denominators for S trainings and P prompts; NaN where there is no value."""

    over: NDArray[np.float64]
    under: NDArray[np.float64]

    def mean(self) -> float | None:
        under = float(np.nansum(self.under))
        return float(np.nansum(self.over)) / under if under else None

    def drawn(self) -> NDArray[np.float64]:
        """(DRAWS,) bootstrap means over trainings and prompts; values of equal size share the drawn prompts."""
        n_trainings, n_prompts = self.over.shape
        trainings = np.concatenate(list(intervals.weights(n_trainings, seed=1)))  # (DRAWS, S)
        over, under = np.nan_to_num(self.over), np.nan_to_num(self.under)
        found: list[float] = []
        for prompts in intervals.weights(n_prompts, seed=0):
            of = trainings[len(found) : len(found) + len(prompts)]
            sums = [((of @ part) * prompts).sum(axis=1) for part in (over, under)]
            found += np.divide(*sums, out=np.full(len(prompts), np.nan), where=sums[1] > 0).tolist()  # type: ignore[call-overload]
        return np.array(found)

    def only(self, is_known: NDArray[np.bool_]) -> _Values:
        """Keep only the selected prompts; the others become NaN."""
        return _Values(*(np.where(is_known, part, np.nan) for part in (self.over, self.under)))


def compare(session: Session, runs: Sequence[Run]) -> list[StudentFacts]:
    """Compare the trained students of runs; the best come first within each measure.

    Intervals are bootstrapped over trainings and prompts. Runs that differ only in name, seed and prompts count as one
    strategy, and trainings that differ only in seed as one setting. Raises `UsageError` when no student of these runs
    was evaluated.
    """
    facts: list[StudentFacts] = []
    for (student, prompts, by), evaluated in _measures(session, runs):
        ids = [evaluation_id for same in evaluated.values() for evaluation_id in same]
        columns = {prompt_id: column for column, prompt_id in enumerate(_prompts_of(session, ids))}
        values = {key: _values(session, same, columns, by) for key, same in evaluated.items()}
        found = [
            StudentFacts(
                student=student,
                prompts=prompts,
                by=by,
                strategy=key[0],
                alpha=key[1],
                training=key[2],
                n_trainings=0 if key == _BEFORE else len(evaluated[key]),
                n_prompts=len(columns),
                n_failed=int(np.isnan(each.over).sum()),
                value=_value(each),
                gain=None if key == _BEFORE else _gain(each, values.get(_BEFORE), by),
                perplexity=_perplexity(each) if by == _LIKELIHOOD else None,
            )
            for key, each in values.items()
        ]
        facts += sorted(found, key=_place)
    if not facts:
        raise UsageError(
            "no student of these runs has been evaluated: persyn student train RUN, then persyn student eval RUN"
        )
    return facts


def _place(fact: StudentFacts) -> float:
    if fact.value is None:
        return np.inf
    return fact.value.mean if fact.by == _LIKELIHOOD else -fact.value.mean


def _value(values: _Values) -> Interval | None:
    mean = values.mean()
    return None if mean is None else intervals.interval(mean, values.drawn())


def _perplexity(values: _Values) -> float | None:
    loss = values.mean()
    return None if loss is None or loss > 700 else math.exp(loss)


def _gain(values: _Values, base: _Values | None, by: str) -> Interval | None:
    """The gain over `base` on the prompts for which both have a value."""
    if base is None:
        return None
    both = np.asarray(~np.isnan(base.over).all(axis=0) & ~np.isnan(values.over).all(axis=0))
    after, before = values.only(both), base.only(both)
    means = after.mean(), before.mean()
    if means[0] is None or means[1] is None:
        return None
    sign = -1.0 if by == _LIKELIHOOD else 1.0
    return intervals.interval(sign * (means[0] - means[1]), sign * (after.drawn() - before.drawn()))


def _measures(session: Session, runs: Sequence[Run]) -> list[tuple[tuple[str, str, str], dict[_Key, list[int]]]]:
    """The finished evaluations of the runs' students, as ((student, prompts, kind of scorer), ids by strategy).

    Evaluations that were generated or scored differently are separate measures, even under the same name.
    """
    rows = session.execute(
        select(Evaluation.id, Evaluation.name, Evaluation.prompts_hash, Evaluation.scorer_id, Evaluation.how)
        .add_columns(Scorer.kind, Scorer.options, Student.name.label("student"), Student.id.label("student_id"))
        .add_columns(Run.config, Training.settings, Evaluation.training_id)
        .join(Scorer, Scorer.id == Evaluation.scorer_id)
        .join(Student, Student.id == Evaluation.student_id)
        .outerjoin(Training, Training.id == Evaluation.training_id)
        .outerjoin(Run, Run.id == Training.run_id)
        .where(
            Evaluation.finished_at.is_not(None), Evaluation.student_id.in_({run.student_id for run in runs} - {None})
        )
        .where(or_(Run.id.in_([run.id for run in runs]), Evaluation.training_id.is_(None)))
        .order_by(Evaluation.id)
    )
    # Keyed by training: of equal evaluations on different GPUs, only the latest counts.
    found: dict[tuple[object, ...], dict[_Key, dict[int | None, int]]] = defaultdict(lambda: defaultdict(dict))
    names: dict[tuple[object, ...], tuple[str, str, str]] = {}
    for row in rows:
        # The scorer of a likelihood is the student itself, so it differs after each training.
        scorer = _text(row.options) if row.kind == _LIKELIHOOD else row.scorer_id
        how = _text({name: value for name, value in row.how.items() if name != "gpus"})
        measure = (row.student_id, row.prompts_hash, row.kind, scorer, how)
        names.setdefault(measure, (row.student, row.name, row.kind))
        key = _BEFORE if row.config is None else _key(row.config, row.settings)
        found[measure][key][row.training_id] = row.id
    return [
        (names[measure], {key: list(ids.values()) for key, ids in by_strategy.items()})
        for measure, by_strategy in found.items()
    ]


def _key(config: dict[str, Any], settings: dict[str, Any]) -> _Key:
    run = load_config(config)
    how = [settings.get("tune"), f"{settings.get('epochs')} epochs", settings.get("learning_rate")]
    trained = ", ".join(str(each) for each in how if each is not None)
    # Runs that differ only in name, seed and prompts are repetitions.
    same = {name: value for name, value in run.frozen().items() if name != "prompts"}
    same["run"] = {name: value for name, value in same["run"].items() if name not in ("name", "seed")}
    settled = {name: value for name, value in settings.items() if name not in ("seed", "micro_batch")}
    return run.strategy.name, run.run.alpha, trained, _text([same, settled])


def _text(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


def _prompts_of(session: Session, evaluation_ids: Sequence[int]) -> list[int]:
    return list(
        session.scalars(
            select(Outcome.prompt_id).where(Outcome.evaluation_id == evaluation_ids[0]).order_by(Outcome.prompt_id)
        )
    )


def _values(session: Session, evaluation_ids: Sequence[int], columns: Mapping[int, int], by: str) -> _Values:
    over = np.full((len(evaluation_ids), len(columns)), np.nan)
    under = np.ones_like(over)
    rows = {evaluation_id: row for row, evaluation_id in enumerate(evaluation_ids)}
    for outcome in session.scalars(select(Outcome).where(Outcome.evaluation_id.in_(evaluation_ids))):
        place = rows[outcome.evaluation_id], columns[outcome.prompt_id]
        if outcome.value is not None:
            over[place] = -outcome.value if by == _LIKELIHOOD else outcome.value
            under[place] = outcome.n_tokens if by == _LIKELIHOOD else 1.0
    under[np.isnan(over)] = np.nan
    return _Values(over, under)
