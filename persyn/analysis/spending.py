"""What a run was planned to spend, has spent, and will have spent, by stage and model; and how its budget stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from msgspec import Struct, structs
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.analysis import plan as planning
from persyn.analysis import summary
from persyn.analysis.plan import Basis, Plan, Share
from persyn.config import load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Run, RunState, Scorer
from persyn.db.connect import Database
from persyn.db.spending import PlannedWork
from persyn.jobs import expenses
from persyn.jobs.expenses import Amount
from persyn.stages.registry import STAGES

#: The stages at whose beginning a run is planned again: the lengths of responses are known after calibration, and the
#: teacher of each prompt after the assignment.
_MOMENTS = ("score", "generate")
_GENERATE, _CALIBRATE = "generate", "calibrate"
_ORDER = {stage: place for place, stage in enumerate(STAGES)}
#: Standard deviations from the mean to the end of an interval of 95%.
_NORMAL_95 = 1.96


class Figures(Struct, frozen=True):
    """Tokens of prompts and responses, US dollars and engine hours; None where unknown."""

    tokens: float
    usd: float | None
    engine_hours: float | None


FIGURES = Figures.__struct_fields__


class ModelSpending(Struct, frozen=True):
    """One model's part of a stage."""

    stage: str
    #: A teacher's name, or the kind of a scorer; empty for the router.
    model: str
    requests: int
    spent: Figures
    #: What the latest plan before the stage said; None for models that are not planned: scorers and routers.
    planned: Figures | None
    #: An interval of 95% for the planned tokens.
    planned_low: float | None
    planned_high: float | None
    #: What was spent and the rest of the work at the lengths measured so far.
    forecast: Figures | None
    #: Requests that were counted by an upper estimate: repeated calls, answers without a count, lost with their worker.
    repeats: int
    uncounted: int
    lost: int

    @property
    def off(self) -> dict[str, float | None]:
        """How much more was spent than planned, as a share of the plan, by name of the figure."""
        return {name: off(getattr(self.planned, name, None), getattr(self.spent, name)) for name in FIGURES}


class Standing(Struct, frozen=True):
    """One limit of a budget, and what is spent of it."""

    #: "the run", "stage NAME" or "teacher NAME".
    scope: str
    #: tokens, usd, engine_hours or deadline.
    key: str
    limit: float | datetime
    spent: float | None = None
    #: Held for requests in flight, by an upper estimate.
    held: float | None = None


class Spending(Struct, frozen=True):
    """A run's spending."""

    models: list[ModelSpending]
    spent: Figures
    #: All models that are planned; None where a run was started before PerSyn stored plans.
    planned: Figures | None
    forecast: Figures | None
    budget: list[Standing]
    #: Whether the run is done, so that the forecast is what was spent.
    is_done: bool

    @property
    def spent_as_planned(self) -> Figures:
        """What the models that are planned have spent."""
        return _total([model.spent for model in self.models if model.planned is not None]) or Figures(0, 0.0, 0.0)

    @property
    def rest(self) -> Figures | None:
        """What the rest of the work would take."""
        return None if self.forecast is None else _combined(lambda one, other: one - other, self.forecast, self.spent)

    @property
    def rest_words(self) -> str | None:
        """What the rest of the work would take, in words."""
        return None if self.rest is None else words(self.rest)

    @property
    def estimated(self) -> list[str]:
        """What was counted by an upper estimate, in words."""
        words = {
            "repeats": "repeated calls",
            "uncounted": "answers without a count of tokens",
            "lost": "lost in flight",
        }
        counts = {name: sum(getattr(model, name) for model in self.models) for name in words}
        return [f"{counts[name]:,} {said}" for name, said in words.items() if counts[name]]


def facts(session: Session, run: Run) -> Spending:
    """What a run has spent, and what it will have spent; takes time proportional to its prompts."""
    config = load_config(run.config)
    names = expenses.teacher_names(session, run.id, config)
    spent = expenses.amounts(session, run.id)
    is_done = run.state is RunState.DONE
    left = {} if is_done else _left(planning.of_run(session, run))
    planned = _planned(session, run)
    to_do = [key for key, row in planned.items() if row.requests]
    open_work = {(stage, teacher_id) for teacher_id, name in names.items() for stage, whose in left if whose == name}
    keys = _in_order({*spent, *((*key, None) for key in (*to_do, *open_work))})
    models = [_model(session, key, spent.get(key, Amount()), names, planned, left) for key in keys]
    mine = [model for model in models if model.planned is not None]
    return Spending(
        models=models,
        spent=_total([model.spent for model in models]) or Figures(0, 0.0, 0.0),
        planned=_total([model.planned for model in mine if model.planned is not None]),
        forecast=_total([model.forecast or model.spent for model in models]),
        budget=standings(session, run, spent, names),
        is_done=is_done,
    )


def standings(
    session: Session, run: Run, spent: Mapping[Any, Amount] | None = None, names: Mapping[int, str] | None = None
) -> list[Standing]:
    """How each limit of a run's budget stands; empty without a budget."""
    config = load_config(run.config)
    if config.budget is None:
        return []
    spent = expenses.amounts(session, run.id) if spent is None else spent
    names = expenses.teacher_names(session, run.id, config) if names is None else names
    found = []
    for scope, limits, amount in expenses.scopes(config.budget, spent, names):
        rows = (
            ("tokens", limits.tokens, amount.tokens, amount.held_tokens),
            ("usd", limits.usd, amount.usd, amount.held_usd),
            ("engine_hours", limits.engine_hours, amount.engine_hours, None),
        )
        found += [Standing(scope, key, limit, done, held) for key, limit, done, held in rows if limit is not None]
        if limits.deadline is not None:
            found.append(Standing(scope, "deadline", limits.deadline))
    return found


def record(database: Database, run_id: int, *, is_start: bool = False) -> None:
    """Store the plan of a run's remaining work if it has reached a stage at whose beginning it is planned.

    Doing it twice stores nothing more. The plan is made without a lock, since it reads all prompts.
    """
    with database.read() as session:
        run = session.get_one(Run, run_id)
        if not is_start and run.stage not in _MOMENTS:
            return
        made = select(PlannedWork.stage).where(PlannedWork.run_id == run_id)
        is_known = made if is_start else made.where(PlannedWork.made_in == run.stage)
        if run.state is RunState.DONE or session.scalars(is_known.limit(1)).first() is not None:
            return
        plan, stage = planning.of_run(session, run), run.stage
        ids = [teacher.id for teacher in lookup.teachers(session, run_id)]
    rows = [
        {"run_id": run_id, "made_in": stage, "teacher_id": ids[place], **row} for place, row in _to_store(plan, stage)
    ]
    with database.write() as session:
        bulk.insert_new(session, PlannedWork, rows)


def add_to_plan(session: Session, run: Run, prompts: int) -> None:
    """Add what new prompts are expected to take to the plan of a run that had a teacher for every prompt.

    prompts: how many are new, of those without a teacher; others are of an earlier extension, and planned already.
    """
    made = PlannedWork.run_id == run.id, PlannedWork.made_in == _GENERATE, PlannedWork.stage == _GENERATE
    rows = {row.teacher_id: row for row in session.scalars(select(PlannedWork).where(*made))}
    if not rows:
        return
    plan, teachers = planning.of_run(session, run), lookup.teachers(session, run.id)
    undecided = {share.teacher: _in_proportion(share, prompts) for share in plan.shares if share.stage == "undecided"}
    part = 1.0 / len(plan.teachers)
    for teacher, basis in zip(teachers, plan.teachers, strict=True):
        share = undecided.get(basis.teacher)
        figures, _, most = _expected(basis, share, part)
        _add(rows[teacher.id], share, figures, most, part=part)
    session.flush()


def add_calibration_to_plan(session: Session, run: Run) -> None:
    """Add to the plan of a run whose grid was complete what its new calibration prompts are expected to take."""
    plan, teachers = planning.of_run(session, run), lookup.teachers(session, run.id)
    shares = {share.teacher: share for share in plan.shares if share.stage == _CALIBRATE}
    planned = _planned(session, run)
    for teacher, basis in zip(teachers, plan.teachers, strict=True):
        row, share = planned.get((_CALIBRATE, teacher.id)), shares.get(basis.teacher)
        if row is not None and share is not None:
            figures, low, most = _expected(basis, share, 1.0)
            _add(row, share, figures, most)
            row.tokens_low += low
    session.flush()


def _add(row: PlannedWork, share: Share | None, more: Figures, most: float, *, part: float = 1.0) -> None:
    """Add a part of a share to a teacher's part of a plan; most: the upper end of the tokens of the whole share."""
    total = _combined(lambda one, other: one + other, Figures(row.tokens, row.usd, row.engine_hours), more)
    row.requests += share.ask.responses * part if share else 0.0
    row.tokens, row.usd, row.engine_hours = total.tokens, total.usd, total.engine_hours
    row.tokens_high += most


def _to_store(plan: Plan, stage: str) -> list[tuple[int, dict[str, Any]]]:
    """The plan by teacher of the stages that are not over; prompts without a teacher are shared evenly.

    A teacher that has nothing to do has a row too, which replaces that of an earlier plan.
    """
    planned = [name for name in ("calibrate", _GENERATE) if _ORDER[name] >= _ORDER.get(stage, 0)]
    return [(place, _row(plan, basis, name)) for place, basis in enumerate(plan.teachers) for name in planned]


def _row(plan: Plan, basis: Basis, stage: str) -> dict[str, Any]:
    """A teacher's part of a stage, in an interval from none to all of the prompts without a teacher."""
    mine = {share.stage: share for share in plan.shares if share.teacher == basis.teacher}
    decided, undecided = mine.get(stage), mine.get("undecided") if stage == _GENERATE else None
    part = 1.0 / len(plan.teachers)
    figures, low, high = _expected(basis, decided, 1.0)
    more, _, most = _expected(basis, undecided, part)
    figures = _combined(lambda one, other: one + other, figures, more)
    requests = sum(share.ask.responses * of for share, of in ((decided, 1.0), (undecided, part)) if share)
    amounts = {"tokens": figures.tokens, "usd": figures.usd, "engine_hours": figures.engine_hours}
    return {"stage": stage, "requests": requests, **amounts, "tokens_low": low, "tokens_high": high + most}


def _expected(basis: Basis, share: Share | None, part: float) -> tuple[Figures, float, float]:
    """What a part of a share is expected to take, and the ends of an interval of 95% for the tokens of all of it.

    The tokens of n responses vary by their own lengths and by the error of the mean of m measured ones: their variance
    is s^2 (n + n^2 / m).
    """
    if share is None or not share.ask.responses:
        return Figures(0.0, 0.0, 0.0), 0.0, 0.0
    ask, n = share.ask, share.ask.responses
    tokens = ask.prompt_tokens + ask.response_tokens
    figures = Figures(tokens * part, _times(ask.cost, part), _times(ask.gpu_hours, part))
    if not basis.measured:  # `max_tokens` is their upper limit
        return figures, ask.prompt_tokens + n, tokens
    spread = _NORMAL_95 * basis.response_deviation * (n + n * n / basis.measured) ** 0.5
    return figures, max(ask.prompt_tokens + n, tokens - spread), tokens + spread


def _in_proportion(share: Share, prompts: int) -> Share:
    """A share with so many of its prompts."""
    figures: Iterable[Any] = (_times(each, prompts / share.prompts) for each in structs.astuple(share.ask))
    return structs.replace(share, prompts=prompts, ask=planning.Amount(*figures))


def _left(plan: Plan) -> dict[tuple[str, str], Figures]:
    """What the remaining work of each stage and teacher is expected to take."""
    found: dict[tuple[str, str], Figures] = {}
    bases = {basis.teacher: basis for basis in plan.teachers}
    for share in plan.shares:
        if share.stage == "all":
            continue
        is_open = share.stage == "undecided"
        figures, _, _ = _expected(bases[share.teacher], share, 1.0 / len(bases) if is_open else 1.0)
        key = (_GENERATE if is_open else share.stage), share.teacher
        found[key] = _combined(lambda one, other: one + other, found[key], figures) if key in found else figures
    return found


def _planned(session: Session, run: Run) -> dict[tuple[str, int], PlannedWork]:
    """The latest plan of each stage and teacher that was made before the stage's end."""
    rows = session.scalars(select(PlannedWork).where(PlannedWork.run_id == run.id)).all()
    return {(row.stage, row.teacher_id): row for row in sorted(rows, key=lambda row: _ORDER.get(row.made_in, 0))}


def _in_order(keys: Iterable[tuple[str, int | None, int | None]]) -> list[tuple[str, int | None, int | None]]:
    return sorted(keys, key=lambda key: (_ORDER.get(key[0], 0), key[1] or 0, key[2] or 0))


def _model(
    session: Session,
    key: tuple[str, int | None, int | None],
    spent: Amount,
    names: Mapping[int, str],
    planned: Mapping[tuple[str, int], PlannedWork],
    left: Mapping[tuple[str, str], Figures],
) -> ModelSpending:
    stage, teacher_id, scorer_id = key
    name = names.get(teacher_id, "") if teacher_id is not None else ""
    if scorer_id is not None:
        name = session.get_one(Scorer, scorer_id).kind
    plan = planned.get((stage, teacher_id)) if teacher_id is not None else None
    figures = Figures(spent.tokens, None if spent.unpriced else spent.usd, spent.engine_hours)
    rest = left.get((stage, name)) if teacher_id is not None else None
    return ModelSpending(
        stage=stage,
        model=name,
        requests=spent.requests,
        spent=figures,
        planned=None if plan is None else Figures(plan.tokens, plan.usd, plan.engine_hours),
        planned_low=None if plan is None else plan.tokens_low,
        planned_high=None if plan is None else plan.tokens_high,
        forecast=figures if rest is None else _combined(lambda one, other: one + other, figures, rest),
        repeats=spent.repeats,
        uncounted=spent.uncounted,
        lost=spent.lost,
    )


def off(planned: float | None, spent: float | None) -> float | None:
    """How much more was spent than planned, as a share; None where that is unknown."""
    return None if planned is None or spent is None or not planned else spent / planned - 1


def words(figures: Figures) -> str:
    """An amount in words, without what is unknown or nothing."""
    parts = [f"{figures.tokens:,.0f} tokens"]
    parts += [summary.dollars(figures.usd)] if figures.usd else []
    parts += [f"{figures.engine_hours:,.2f} engine hours"] if figures.engine_hours else []
    return ", ".join(parts)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _combined(how: Callable[[float, float], float], one: Figures, other: Figures) -> Figures:
    def both(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else how(a, b)

    return Figures(how(one.tokens, other.tokens), both(one.usd, other.usd), both(one.engine_hours, other.engine_hours))


def _total(parts: list[Figures]) -> Figures | None:
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = _combined(lambda one, other: one + other, total, part)
    return total
