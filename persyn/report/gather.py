"""Gather a report's facts from the store, using the modules that compute them elsewhere."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import String, Subquery, and_, cast, func, literal, or_, select
from sqlalchemy.orm import Session

from persyn.analysis import compare, listing, recalibration, spending, summary, watch
from persyn.config import RunConfig, load_config
from persyn.db import grid, lookup
from persyn.db.catalog import Prompt, Run, RunPrompt, RunState, RunTeacher, Scorer, Student, Teacher
from persyn.db.grid import Grid
from persyn.db.results import Assignment, Response, Router
from persyn.db.work import Job, JobState
from persyn.errors import UsageError, shorten
from persyn.llm import quality
from persyn.method import intervals, learnability, rewards, routing_metrics
from persyn.method.rewards import Matrix
from persyn.report import examples
from persyn.report.facts import (
    AlphaPoint,
    Alphas,
    Groups,
    ModelFacts,
    Report,
    Rewards,
    RewardShape,
    RouterFacts,
    Savings,
    StagePace,
    TeacherMeans,
    Timeline,
)

if TYPE_CHECKING:
    from persyn.analysis.refits import Curve

_ALPHAS = tuple(step / 10 for step in range(11))
_REWARD_BINS, _TIME_BINS = 24, 120
#: Prompts inspected for a field to group by, and the permitted number of its values.
_LOOKED_AT, _FEW = 2_000, range(2, 13)
_OTHERS, _NONE = "(others)", "(none)"


def gather(session: Session, run: Run, *, group_by: str | None = None, curve: Curve | None = None) -> Report:
    """Read all facts of a report, at any stage of the run.

    group_by: a metadata field of the prompts; None selects the first text field with few values, if there is one.
    curve:    the learning curve from `refits.curve`, which needs the router's backbone.
    Raises `UsageError` when no prompt of the run has the field.
    """
    config = load_config(run.config)
    cells = grid.read(session, run)
    rewarded = cells.rewards()
    teachers = list(lookup.teachers(session, run.id))
    names = [teacher.name for teacher in teachers]
    facts = summary.facts(session, run)
    router = session.get(Router, run.router_id) if run.router_id is not None else None
    absent: dict[str, str] = {}
    scores = compare.router_scores(session, run, cells)
    swept = _swept(session, run, cells, scores, absent)
    hits, believed = _measured(config, cells, rewarded, scores, absent)
    if curve is None:
        absent["the router curve"] = f"computed only by 'persyn report {run.name} --curve'"
    return Report(
        written_at=datetime.now(UTC),
        versions=_versions(),
        created_at=run.created_at,
        finished_at=run.finished_at,
        config=run.config,
        config_hash=run.config_hash,
        unit=quality.unit(config),
        quality=quality.name(config),
        learnability_unit=_learnability_unit(config, cells),
        models=_models(session, run, config, teachers),
        engines=_engines(session, run),
        router=_fitted(router),
        facts=facts,
        recalibrations=recalibration.words(session, run),
        failures=watch.count_rows(session, run).failures,
        groups=_groups(session, run, facts.teachers, group_by, absent),
        means=_means(cells, names),
        rewards=_rewards(config, rewarded, names),
        curve=curve,
        hits=hits,
        reliability=believed,
        alphas=_alphas(config, cells, names, swept),
        comparison=swept.get(config.run.alpha),
        savings=_savings(facts, cells, absent),
        spending=spending.facts(session, run),
        timeline=_timeline(session, run, absent),
        examples=examples.draw(session, run, cells, rewarded, facts),
        absent=absent,
    )


def _versions() -> dict[str, str]:
    packages = ("persyn", "matplotlib", "numpy", "sqlalchemy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _learnability_unit(config: RunConfig, cells: Grid) -> str | None:
    if not cells.has_learnability:
        return None
    of = config.run
    return learnability.unit(of.learnability, per=of.learnability_per, on=of.learnability_on)


def _models(session: Session, run: Run, config: RunConfig, teachers: list[Teacher]) -> list[ModelFacts]:
    found = []
    if run.student_id is not None and config.student is not None:
        student = session.get_one(Student, run.student_id)
        found.append(
            ModelFacts(
                part="student",
                name=student.name,
                kind=config.student.engine,
                model=student.model,
                revision=student.revision,
                template_hash=student.template_hash,
                fingerprint=student.fingerprint,
            )
        )
    for teacher in teachers:
        found.append(
            ModelFacts(
                part="teacher",
                name=teacher.name,
                kind=teacher.engine,
                model=teacher.model,
                revision=teacher.revision,
                template_hash=teacher.template_hash,
                fingerprint=teacher.fingerprint,
                license=teacher.license,
            )
        )
    scorers = [("quality", scorer) for scorer in lookup.quality_scorers(session, run)]
    if run.learnability_scorer_id is not None:
        scorers.append(("learnability", session.get_one(Scorer, run.learnability_scorer_id)))
    for part, scorer in scorers:
        found.append(
            ModelFacts(
                part=part,
                name=scorer.kind,
                kind=scorer.kind,
                model=scorer.model,
                revision=scorer.revision,
                template_hash=None,
                fingerprint=scorer.fingerprint,
            )
        )
    return found


def _engines(session: Session, run: Run) -> dict[str, int]:
    """Count the dataset's responses by engine."""
    rows = session.execute(
        select(Response.engine, func.count())
        .join(Assignment, lookup.in_dataset(run))
        .where(Assignment.run_id == run.id, Response.text.is_not(None))
        .group_by(Response.engine)
        .order_by(Response.engine)
    )
    return {engine or "not known": count for engine, count in rows}


def _fitted(router: Router | None) -> RouterFacts | None:
    if router is None:
        return None
    return RouterFacts(
        kind=router.kind,
        backbone=router.backbone,
        revision=router.revision,
        tune=router.tune,
        path=router.path,
        sha256=router.sha256,
        fingerprint=router.fingerprint,
        versions=router.metrics.get("versions", {}),
        metrics=router.metrics,
    )


def _swept(
    session: Session, run: Run, cells: Grid, scores: Matrix | None, absent: dict[str, str]
) -> dict[float, compare.Comparison]:
    """{alpha: comparison of strategies}, including the run's own alpha; empty without a scored hold-out."""
    alphas = sorted({*_ALPHAS, load_config(run.config).run.alpha})
    if not cells.has_learnability:
        alphas = [0.0]
    elif cells.alpha == 0 and np.isnan(cells.learnability).all() and not np.isnan(cells.quality).all():
        alphas = [0.0]
        absent["learnability"] = "no response has it; strategies are compared by quality alone"
    try:
        return {one.alpha: one for one in compare.sweep(session, run, cells, alphas, scores)}
    except UsageError:
        absent["strategies"] = (
            "the calibration grid is not scored yet" if cells.is_holdout.any() else "the run has no hold-out prompts"
        )
        return {}


def _measured(
    config: RunConfig,
    cells: Grid,
    rewarded: Matrix,
    scores: Matrix | None,
    absent: dict[str, str],
) -> tuple[routing_metrics.Hits | None, list[routing_metrics.Believed]]:
    """The router's hit rates and reliability on the hold-out."""
    holdout = cells.is_holdout & ~np.isnan(rewarded).all(axis=1)
    if scores is None or not holdout.any():
        absent["the router on the hold-out"] = "there is no router that has scored a hold-out prompt"
        return None, []
    hits = routing_metrics.hits(scores[holdout], rewarded[holdout], rewarded[~cells.is_holdout])
    errors = cells.reward_errors()
    believed = routing_metrics.reliability(
        scores[holdout],
        rewarded[holdout],
        preferences=config.router.preferences,
        errors=None if errors is None else errors[holdout],
    )
    return hits, believed


def _means(cells: Grid, names: list[str]) -> list[TeacherMeans]:
    means = _intervals(cells.quality), _intervals(cells.learnability)
    return [TeacherMeans(*row) for row in zip(names, *means, strict=True)]


def _intervals(values: Matrix) -> list[intervals.Interval | None]:
    """Each column's mean over its present values, with an interval; None for a column without values."""
    present = (~np.isnan(values)).astype(np.float64)
    filled = np.nan_to_num(values)
    counted = present.sum(axis=0)
    if not counted.any():
        return [None] * values.shape[1]
    with np.errstate(invalid="ignore"):
        drawn = np.concatenate([(w @ filled) / (w @ present) for w in intervals.weights(len(values), seed=0)])
    means = filled.sum(axis=0) / np.where(counted > 0, counted, 1)
    return [intervals.interval(float(means[k]), drawn[:, k]) if counted[k] else None for k in range(values.shape[1])]


def _rewards(config: RunConfig, rewarded: Matrix, names: list[str]) -> Rewards | None:
    if np.isnan(rewarded).all():
        return None
    lowest, highest = float(np.nanmin(rewarded)), float(np.nanmax(rewarded))
    if config.run.normalise != "zscore":
        lowest, highest = 0.0, 1.0
    edges = np.linspace(lowest, max(highest, lowest + 1e-9), _REWARD_BINS + 1)
    shapes = []
    for name, column in zip(names, rewarded.T, strict=True):
        known = column[~np.isnan(column)]
        if len(known):
            shapes.append(RewardShape(name, float(known.mean()), np.histogram(known, edges)[0].tolist()))
    return Rewards(config.run.alpha, config.run.normalise, lowest, float(edges[-1]), shapes)


def _alphas(config: RunConfig, cells: Grid, names: list[str], swept: dict[float, compare.Comparison]) -> Alphas | None:
    if not cells.has_learnability:
        return None
    points = []
    for alpha in sorted({*_ALPHAS, config.run.alpha}):
        rewarded = cells.rewards(alpha=alpha)
        rewarded = rewarded[~np.isnan(rewarded).all(axis=1)]
        if not len(rewarded):
            return None
        is_best = rewarded == np.nanmax(rewarded, axis=1, keepdims=True)
        ranking = rewards.static_ranking(rewarded)
        found = swept.get(alpha)
        points.append(
            AlphaPoint(
                alpha=alpha,
                winners=(is_best / is_best.sum(axis=1, keepdims=True)).mean(axis=0).tolist(),
                best=int(np.nanargmax(ranking)),
                strategies={fact.strategy: fact.reward.mean for fact in found.strategies} if found else {},
            )
        )
    return Alphas(config.run.alpha, names, points)


def _savings(facts: summary.Summary, cells: Grid, absent: dict[str, str]) -> Savings | None:
    if not len(cells.prompt_ids):
        absent["savings"] = "there is no calibration grid to estimate generate-all from"
        return None
    if not facts.tokens_generate_all:
        absent["savings"] = "not every teacher has a token count in the calibration grid yet"
        return None
    is_all = facts.state == RunState.DONE
    return Savings(facts.tokens, facts.tokens_generate_all, facts.cost, facts.cost_generate_all, is_all)


def _groups(
    session: Session, run: Run, teachers: list[summary.TeacherFacts], field: str | None, absent: dict[str, str]
) -> Groups | None:
    """Count assigned prompts by group and teacher; rare groups are counted together."""
    chosen = field or _field_of_few(session, run)
    if chosen is None:
        absent["shares by group"] = "no metadata field of the prompts has few values; choose one to group by"
        return None
    if not listing.is_field(chosen):
        raise UsageError(f"cannot group by {chosen!r}: the name of the field contains a quote or a backslash")
    valued = _valued(run, chosen)
    counted = select(valued.c.value).group_by(valued.c.value).order_by(func.count().desc(), valued.c.value)
    groups = list(session.scalars(counted.limit(_FEW.stop - 1)))
    if not groups:
        absent["shares by group"] = "no prompt is assigned yet"
        return None
    if field is not None and groups == [_NONE]:
        raise UsageError(
            f"no assigned prompt of run {run.name!r} has a field {field!r} in its metadata; "
            f"fields: {shorten(', '.join(listing.fields(session, run))) or 'none'}"
        )
    rows = session.execute(
        select(valued.c.position, valued.c.value, func.count())
        .where(valued.c.value.in_(groups))
        .group_by(valued.c.position, valued.c.value)
    )
    prompts = np.zeros((len(teachers), len(groups)), dtype=np.int64)
    for position, value, count in rows:
        prompts[position, groups.index(value)] = count
    others = np.array([teacher.assigned for teacher in teachers]) - prompts.sum(axis=1)
    if others.any():
        prompts, groups = np.column_stack([prompts, others]), [*groups, _OTHERS]
    return Groups(chosen, groups, [teacher.teacher for teacher in teachers], prompts.tolist())


def _valued(run: Run, field: str) -> Subquery:
    """Select the run's assignments with their teacher's position and the value of their prompt's field."""
    value = func.coalesce(func.nullif(cast(Prompt.meta[field].as_string(), String), ""), literal(_NONE))
    return (
        select(RunTeacher.position, value.label("value"))
        .select_from(Assignment)
        .join(Prompt, Prompt.id == Assignment.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Assignment.teacher_id))
        .where(Assignment.run_id == run.id)
        .subquery()
    )


def _field_of_few(session: Session, run: Run) -> str | None:
    """The first metadata field that is a text in all inspected prompts and has few values."""
    metas = session.scalars(
        select(Prompt.meta)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id)
        .order_by(RunPrompt.prompt_id)
        .limit(_LOOKED_AT)
    ).all()
    field: str
    for field in metas[0] if metas else ():
        values = [meta.get(field) for meta in metas]
        if not listing.is_field(field):
            continue
        if all(isinstance(value, str) for value in values) and len(set(values)) in _FEW:
            return field
    return None


def _timeline(session: Session, run: Run, absent: dict[str, str]) -> Timeline | None:
    of_run = Job.run_id == run.id
    finished = of_run, Job.state == JobState.DONE, Job.started_at.is_not(None), Job.finished_at.is_not(None)
    began, ended = session.execute(select(func.min(Job.started_at), func.max(Job.finished_at)).where(*finished)).one()
    seconds = _seconds(began, ended) if began and ended else 0.0
    if seconds <= 0:
        absent["work over time"] = "no job is done yet"
        return None
    edges = np.linspace(0, seconds, _TIME_BINS + 1)
    done: dict[str, NDArray[np.float64]] = {}
    jobs = select(Job.stage, Job.started_at, Job.finished_at, Job.n_prompts).where(*finished).order_by(Job.id)
    for stage, start, end, rows in session.execute(jobs, execution_options={"yield_per": 1000}):
        so_far = done.setdefault(stage, np.zeros(_TIME_BINS + 1))
        # A job may end in the same instant in which it began; its rows still count as done at the end.
        times = _seconds(began, start), max(_seconds(began, end), _seconds(began, start) + 1e-3)
        so_far += rows * np.where(edges < edges[-1], np.interp(edges, times, (0, 1)), 1.0)
    # The remaining rows of a cancelled job are planned again, unless the run was cancelled too.
    is_left = literal(run.state in (RunState.CANCELLED, RunState.PAUSED)) & (Job.stage == run.stage)
    counts = of_run, or_(Job.state != JobState.CANCELLED, is_left)
    planned: dict[str, int] = dict(
        session.execute(select(Job.stage, func.sum(Job.n_prompts)).where(*counts).group_by(Job.stage)).all()
    )
    return Timeline(
        seconds, [StagePace(stage, np.diff(so_far).tolist(), int(planned[stage])) for stage, so_far in done.items()]
    )


def _seconds(start: Any, end: Any) -> float:
    return float((end - start).total_seconds())
