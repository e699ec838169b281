"""A run's calibration grid as arrays, prompts x teachers: raw scores, and the rewards computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, func, null, select, true
from sqlalchemy.orm import Session, aliased

from persyn.config import On, Per, load_config
from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher
from persyn.db.results import Response, Score
from persyn.db.text import call_characters
from persyn.errors import UsageError
from persyn.method import learnability as learnabilities
from persyn.method import rewards
from persyn.method.intervals import Vector
from persyn.method.learnability import LEARNABILITIES, Learnability
from persyn.method.rewards import Matrix, Normalisation

#: Prompts of a part.
_PART = 10_000
#: Why a run has no learnability, and what to do.
NOT_SCORED = (
    "the run is at alpha 0 and scores no learnability. Start a run under another name with an alpha above 0 and a "
    "[student]: it uses the stored responses and qualities, and only the student scores"
)


@dataclass(frozen=True, slots=True)
class Grid:
    """P prompts x T teachers; a cell without a response or a score is NaN.

    Figures of a cell are means over its samples, of which failed ones do not count.

    prompt_ids:   (P,) ascending.
    is_holdout:   (P,) prompts used only to measure the router.
    teacher_ids:  (T,) in head order.
    quality:      (P, T) raw, in the quality scorer's unit.
    learnability: (P, T) of a response or a part of it, by one of `LEARNABILITIES`, in its unit: a log-likelihood in
                  nats per token, per character or in total.
    quality_errors, learnability_errors: (P, T) standard errors of these means, see `rewards.sample_errors`.
    prompt_tokens, response_tokens: (P, T) of one response, as the engine counted them; NaN where it did not.
    n_responses:  (P, T) number of responses with a text.
    alpha, how:   the run's definition of the reward.
    is_log_likelihood: whether learnability is a log-likelihood, so that its negative is the student's loss.
    has_learnability:  whether the run scores learnability; without, only rewards at alpha 0 exist.
    """

    prompt_ids: NDArray[np.int64]
    is_holdout: NDArray[np.bool_]
    teacher_ids: NDArray[np.int64]
    quality: NDArray[np.float64]
    learnability: NDArray[np.float64]
    quality_errors: NDArray[np.float64]
    learnability_errors: NDArray[np.float64]
    prompt_tokens: NDArray[np.float64]
    response_tokens: NDArray[np.float64]
    n_responses: NDArray[np.int64]
    alpha: float
    how: Normalisation
    is_log_likelihood: bool = True
    has_learnability: bool = True

    def rewards(self, *, alpha: float | None = None, how: Normalisation | None = None) -> Matrix:
        """(P, T) rewards, see `rewards.combine`; None means the run's own definition.

        Raises `UsageError` for an alpha outside 0 to 1, above 0 without learnability, and for an unknown normalisation.
        """
        return rewards.combine(self.quality, self.learnability, **self._definition(alpha, how))

    def reward_errors(self, *, alpha: float | None = None, how: Normalisation | None = None) -> Matrix | None:
        """(P, T) standard errors of `rewards`; None if no cell has two samples, so that nothing is known of them."""
        if not (self.quality_errors.any() or self.learnability_errors.any()):
            return None
        raw = self.quality, self.learnability, self.quality_errors, self.learnability_errors
        return rewards.combine_errors(*raw, **self._definition(alpha, how))

    def _definition(self, alpha: float | None, how: Normalisation | None) -> dict[str, Any]:
        alpha = self.alpha if alpha is None else alpha
        if not 0.0 <= alpha <= 1.0:
            raise UsageError(f"alpha must be within [0, 1], got {alpha}")
        if alpha and not self.has_learnability:
            raise UsageError(f"there is no reward at alpha {alpha:g}: {NOT_SCORED}")
        _require_known("normalise", how, Normalisation)
        return {"alpha": alpha, "how": how or self.how}


class Means(NamedTuple):
    """Each teacher's means over the prompts of a grid, (T,); NaN for a teacher without any."""

    quality: Vector
    learnability: Vector
    reward: Vector
    #: See `rewards.static_ranking`.
    ranking: Vector


class Measure(NamedTuple):
    """How learnability is measured.

    kind: the definition.
    per:  the divisor of the log-likelihood, with `log_likelihood`; otherwise `token`.
    on:   the part of a response that counts. With `reasoning`, a response without reasoning has no learnability.
    """

    kind: Learnability
    per: Per
    on: On


def measure(run: Run, *, learnability: str | None = None, per: Per | None = None, on: On | None = None) -> Measure:
    """How a run measures learnability; what is not None replaces the run's own.

    Raises `UsageError` if one is unknown, for a `per` that does not apply, and if the run scores no learnability.
    """
    _require_known("per", per, Per)
    _require_known("on", on, On)
    if run.learnability_scorer_id is None and (learnability or per or on):
        raise UsageError(f"run {run.name!r} has no learnability to define: {NOT_SCORED}")
    config = load_config(run.config)
    kind = LEARNABILITIES.require(learnability or config.run.learnability, "learnability")
    if kind.name != "log_likelihood":
        if per is not None:
            raise UsageError(f"learnability {kind.name} has no divisor, got per {per}; only log_likelihood has one")
        per = "token"
    per = per or config.run.learnability_per
    if per != "token" and config.student and config.student.options.get("response_tokens"):
        raise UsageError(f"learnability per {per} needs whole responses; run {run.name} scored only first tokens")
    return Measure(kind, per, on or config.run.learnability_on)


def read(
    session: Session,
    run: Run,
    *,
    learnability: str | None = None,
    per: Per | None = None,
    on: On | None = None,
    prompt_ids: tuple[int, int] | None = None,
) -> Grid:
    """Read a run's grid as far as it is complete.

    prompt_ids: only the rows of calibration prompts from the first to the last of these ids, perhaps none.
    learnability, per, on: see `measure`.
    Raises `UsageError` as `measure` does, if `on` is `reasoning`, unlike in the run, and there is none, and if the
    scores lack the statistics that the learnability needs.
    """
    measured = measure(run, learnability=learnability, per=per, on=on)
    config = load_config(run.config).run
    wanted = RunPrompt.prompt_id.between(*prompt_ids) if prompt_ids is not None else true()
    prompts = session.execute(
        select(RunPrompt.prompt_id, RunPrompt.role)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET, wanted)
        .order_by(RunPrompt.prompt_id)
    ).all()
    teacher_ids = session.scalars(
        select(RunTeacher.teacher_id).where(RunTeacher.run_id == run.id).order_by(RunTeacher.position)
    ).all()
    row_of = {prompt.prompt_id: row for row, prompt in enumerate(prompts)}
    column_of = {teacher_id: column for column, teacher_id in enumerate(teacher_ids)}
    shape = len(prompts), len(teacher_ids), config.samples
    # None becomes NaN.
    counted = {name: np.full(shape, np.nan) for name in ("quality", "prompt_tokens", "response_tokens")}
    learned, n_responses = np.full(shape, np.nan), np.zeros(shape[:2], dtype=np.int64)
    found = scored_responses(run, measured.kind).where(wanted, Response.sample < config.samples)
    with session.execute(found, execution_options={"yield_per": 10_000}) as cells:
        for cell in cells:
            place = row_of[cell.prompt_id], column_of[cell.teacher_id], cell.sample
            n_responses[place[:2]] += cell.n_characters is not None
            learned[place] = learnability_of(run, cell, measured)
            for name, values in counted.items():
                values[place] = getattr(cell, name)
    is_other = measured.on != config.learnability_on
    if is_other and measured.on == "reasoning" and len(prompts) and np.isnan(learned).all():
        raise UsageError(f"run {run.name} has no scored reasoning to compute learnability on; use answer or both")
    return Grid(
        prompt_ids=np.array([prompt.prompt_id for prompt in prompts], dtype=np.int64),
        is_holdout=np.array([prompt.role == Role.HOLDOUT for prompt in prompts], dtype=np.bool_),
        teacher_ids=np.array(teacher_ids, dtype=np.int64),
        quality=rewards.sample_means(counted["quality"]),
        learnability=rewards.sample_means(learned),
        quality_errors=rewards.sample_errors(counted["quality"]),
        learnability_errors=rewards.sample_errors(learned),
        prompt_tokens=rewards.sample_means(counted["prompt_tokens"]),
        response_tokens=rewards.sample_means(counted["response_tokens"]),
        n_responses=n_responses,
        alpha=config.alpha,
        how=config.normalise,
        is_log_likelihood=measured.kind.is_log_likelihood,
        has_learnability=run.learnability_scorer_id is not None,
    )


def parts(session: Session, run: Run) -> Iterator[Grid]:
    """Read a run's grid in parts, so that memory does not grow with the number of prompts."""
    prompts = select(RunPrompt.prompt_id).where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET)
    prompts = prompts.order_by(RunPrompt.prompt_id).limit(_PART)
    last = 0
    while prompt_ids := session.scalars(prompts.where(RunPrompt.prompt_id > last)).all():
        last = prompt_ids[-1]
        yield read(session, run, prompt_ids=(prompt_ids[0], last))


def means(of_parts: Iterable[Grid]) -> Means:
    """Each teacher's means over all parts of a grid."""
    quality, learnability, reward, informative = (rewards.RunningMeans() for _ in range(4))
    for cells in of_parts:
        rewarded = cells.rewards()
        quality.add(cells.quality)
        learnability.add(cells.learnability)
        reward.add(rewarded)
        informative.add(rewarded[rewards.informative(rewarded)])
    ranking = rewards.ranking_of(informative.found, reward.found)
    return Means(quality.found, learnability.found, reward.found, ranking)


def _require_statistics(run: Run, cell: Any, kind: Learnability) -> None:
    """Raise `UsageError` for a score without a statistic that a learnability needs."""
    if not kind.needs or cell.log_likelihood is None:
        return
    if cell.statistics is None or not set(kind.extra) <= cell.statistics["answer"].keys():
        why = "does not include" if cell.statistics else "was stored by an earlier version of PerSyn without"
        raise UsageError(
            f"learnability {kind.name} needs the statistics {', '.join(kind.needs)}, which the student's score of the "
            f"responses in run {run.name} {why}. Start a run with another name and [run] learnability = "
            f'"{kind.name}": it uses the stored responses, and only the student scores them again'
        )


def learnability_of(run: Run, cell: Any, measured: Measure) -> float:
    """The learnability of a response's parts; NaN where nothing was scored.

    cell: a row of `scored_responses`.
    Raises `UsageError` if its score lacks the statistics that the learnability needs.
    """
    _require_statistics(run, cell, measured.kind)
    if measured.kind.name == "log_likelihood":
        return _log_likelihood(cell, measured.per, measured.on)
    if cell.log_likelihood is None:
        return np.nan
    parts = {"answer": cell.statistics["answer"] | {"log_likelihood": cell.log_likelihood, "n_tokens": cell.n_tokens}}
    if cell.reasoning_n_tokens:
        counted = {"log_likelihood": cell.reasoning_log_likelihood, "n_tokens": cell.reasoning_n_tokens}
        parts["reasoning"] = cell.statistics.get("reasoning", {}) | counted
        parts["both"] = learnabilities.joined(parts["answer"], parts["reasoning"])
    part = parts.get(measured.on, parts["answer"] if measured.on == "both" else None)
    return np.nan if part is None else learnabilities.value(measured.kind, part)


def _log_likelihood(cell: Any, per: Per, on: On) -> float:
    """The log-likelihood of a response's parts, divided as asked; NaN where nothing was scored."""
    answer = _part(cell.log_likelihood, cell.n_tokens, cell.n_characters)
    reasoning = _part(cell.reasoning_log_likelihood, cell.reasoning_n_tokens, cell.n_reasoning_characters)
    both = answer + (reasoning if cell.reasoning_n_tokens else 0.0)
    nats, n_tokens, n_characters = {"answer": answer, "reasoning": reasoning, "both": both}[on]
    divisor = {"token": n_tokens, "character": n_characters, "response": 1.0}[per]
    return float(nats / divisor) if n_tokens > 0 and divisor > 0 else np.nan


def _part(nats: float | None, n_tokens: int | None, n_characters: int | None) -> NDArray[np.float64]:
    """(3,) NaN for what is unknown."""
    return np.array([nats, n_tokens, n_characters], dtype=np.float64)


def _require_known(name: str, value: str | None, kind: Any) -> None:
    if value is not None and value not in get_args(kind):
        raise UsageError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


def scored_responses(run: Run, kind: Learnability) -> Select[Any]:
    """Select the responses of a run's grid with their raw scores, as `learnability_of` reads them."""
    quality, likelihood = aliased(Score), aliased(Score)
    return (
        select(
            Response.prompt_id,
            Response.teacher_id,
            Response.sample,
            quality.value.label("quality"),
            likelihood.value.label("log_likelihood"),
            likelihood.n_tokens,
            (func.length(Response.text) + call_characters(Response.tool_calls)).label("n_characters"),
            likelihood.reasoning_value.label("reasoning_log_likelihood"),
            likelihood.reasoning_n_tokens,
            (likelihood.statistics if kind.needs else null()).label("statistics"),
            func.length(Response.reasoning).label("n_reasoning_characters"),
            Response.prompt_tokens,
            Response.response_tokens,
        )
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == Response.prompt_id))
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .outerjoin(quality, and_(quality.response_id == Response.id, quality.scorer_id == run.quality_scorer_id))
        .outerjoin(
            likelihood,
            and_(likelihood.response_id == Response.id, likelihood.scorer_id == run.learnability_scorer_id),
        )
        .where(RunPrompt.role != Role.TARGET)
    )
