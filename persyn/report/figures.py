"""Draw a run's figures from plain facts, without database or files. Importing it imports matplotlib, so import it late.

Where there are more teachers than colours, position and number distinguish them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from persyn.analysis.compare import Comparison
from persyn.analysis.summary import TeacherFacts, dollars
from persyn.method.routing_metrics import Believed, Hits
from persyn.method.strategies import STRATEGIES
from persyn.report import control_charts
from persyn.report.drawing import INK, Picture, label, laid_out, styled
from persyn.report.facts import Alphas, Groups, Report, Rewards, Savings, TeacherMeans, Timeline
from persyn.stages.registry import STAGES

if TYPE_CHECKING:
    from persyn.analysis.refits import Curve

T = TypeVar("T")

#: Contrast of at least 3 on white and on black; distinguishable by lightness or hue with any colour vision.
COLOURS = {
    "blue": "#2f7fc1",
    "orange": "#c9701c",
    "green": "#1f9a73",
    "purple": "#a866c0",
    "red": "#d14d57",
    "grey": "#7d838c",
}
_BLUE, _ORANGE, _GREEN, _PURPLE, _RED, _GREY = COLOURS.values()
_OTHER = ("grey", "*", "-")
_WIDTH = 5.2


def pictures(report: Report) -> list[Picture]:
    """Draw every figure for which there are facts, in reading order."""
    return [draw() for draw in drawable(report).values()]


def drawable(report: Report) -> dict[str, Callable[[], Picture]]:
    """Functions that draw the figures for which there are facts, by name, in reading order."""
    prepared = ((name, prepare(report)) for name, prepare in FIGURES.items())
    return {name: draw for name, draw in prepared if draw is not None}


def _style_of(strategy: str) -> tuple[str, str, str]:
    """Colour, marker and line of a strategy; those of a custom one where it is not registered by this name."""
    colour, marker, line = STRATEGIES[strategy].style if strategy in STRATEGIES else _OTHER
    return COLOURS[colour], marker, line


def _if(facts: T | Literal[False] | None, draw: Callable[[T], Picture]) -> Callable[[], Picture] | None:
    """A function that draws a figure of these facts; None without facts."""
    return partial(draw, facts) if facts else None


def teacher_shares(teachers: Sequence[TeacherFacts]) -> Picture:
    """Prompts assigned to each teacher, in descending order."""
    ordered = sorted(teachers, key=lambda teacher: -teacher.assigned)
    total = sum(teacher.assigned for teacher in ordered)
    with styled():
        figure, axes = _rows([teacher.teacher for teacher in ordered])
        bars = axes.barh(range(len(ordered)), [teacher.assigned for teacher in ordered], color=_BLUE, height=0.66)
        labels = [f"{teacher.assigned:,} ({_share(teacher.assigned, total)})" for teacher in ordered]
        axes.bar_label(bars, labels, padding=3)
        axes.margins(x=0.3)
        axes.set_xlabel("prompts assigned")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_counted))
    said = [f"{teacher.teacher} {_share(teacher.assigned, total)}" for teacher in ordered]
    return _picture("teacher-shares", "Prompts by teacher", f"Of {total:,} prompts: {', '.join(said)}.", figure)


def group_shares(groups: Groups) -> Picture:
    """The distribution of each group's prompts over teachers; each column adds up to 100%."""
    counts = np.array(groups.prompts, dtype=np.float64).reshape(len(groups.teachers), len(groups.groups))
    totals = counts.sum(axis=0)
    shares = counts / np.where(totals > 0, totals, 1)
    with styled():
        figure, axes = _heat(groups.teachers, groups.groups, shares)
        axes.set_xlabel(f"prompts by {label(groups.field)}, each column 100%")
    said = [
        f"{group} mostly to {groups.teachers[int(column.argmax())]} ({column.max():.0%})"
        for group, column in zip(groups.groups, shares.T, strict=True)
    ]
    return _picture("group-shares", f"Prompts by teacher and {groups.field}", f"{'; '.join(said)}.", figure)


def quality_learnability(teachers: Sequence[TeacherMeans], *, unit: str, learnability_unit: str) -> Picture:
    """Quality against learnability: each teacher's means over the grid, with 95% intervals.

    unit: of quality.
    """
    shown = [(t.teacher, t.quality, t.learnability) for t in teachers]
    with styled():
        figure, axes = _axes(3.4 + 0.16 * ((len(shown) + 1) // 2))
        axes.grid(True)
        for number, (name, quality, learnability) in enumerate(shown, 1):
            if quality is None or learnability is None:
                continue
            x, y = learnability, quality
            axes.plot([x.low, x.high], [y.mean, y.mean], color=_BLUE, linewidth=0.8, alpha=0.7)
            axes.plot([x.mean, x.mean], [y.low, y.high], color=_BLUE, linewidth=0.8, alpha=0.7)
            axes.plot(x.mean, y.mean, "o", color=_BLUE, markersize=11, label=f"{number} {label(name)}")
            axes.annotate(str(number), (x.mean, y.mean), ha="center", va="center", color="white", fontsize=7)
        axes.set_xlabel(f"learnability ({learnability_unit})")
        axes.set_ylabel(f"quality ({unit})")
        legend = figure.legend(loc="outside lower left", ncols=2, handlelength=0, handletextpad=0, markerscale=0)
        legend.set_alpha(1)
    said = [
        f"{name}: quality {quality.mean:.3g}, learnability {learnability.mean:.3g}"
        for name, quality, learnability in shown
        if quality and learnability
    ]
    return _picture("quality-learnability", "Quality and learnability by teacher", f"{'; '.join(said)}.", figure)


def reward_distributions(rewards: Rewards) -> Picture:
    """The distribution of each teacher's rewards over the grid's prompts, with their mean."""
    edges = np.linspace(rewards.lowest, rewards.highest, len(rewards.teachers[0].counts) + 1)
    with styled():
        figure, axes = _rows([teacher.teacher for teacher in rewards.teachers], each=0.42)
        for place, teacher in enumerate(rewards.teachers):
            counts = np.array(teacher.counts, dtype=np.float64)
            # The axis points down, so a row's baseline is its lower edge.
            floor = place + 0.42
            heights = 0.84 * counts / max(counts.max(), 1)
            axes.stairs(floor - heights, edges, baseline=floor, fill=True, color=_BLUE, alpha=0.65)
            axes.plot([teacher.mean, teacher.mean], [floor, floor - 0.84], color=_ORANGE, linewidth=2)
        axes.set_ylim(len(rewards.teachers) - 0.45, -0.6)
        axes.set_xlabel(f"reward at alpha {rewards.alpha:g}, {rewards.normalise}; line: mean")
    said = [f"{teacher.teacher} {teacher.mean:.3f}" for teacher in rewards.teachers]
    return _picture("rewards", "Rewards by teacher", f"Mean rewards: {', '.join(said)}.", figure)


def router_curve(curve: Curve) -> Picture:
    """The router's hold-out reward against the number of calibration prompts."""
    sizes = [point.n_calibration for point in curve.points]
    means = np.array([point.reward for point in curve.points])
    spread = np.array([point.deviation for point in curve.points])
    with styled():
        figure, axes = _axes(2.9)
        axes.grid(True)
        axes.axhline(curve.oracle, color=_GREY, linestyle=":", label="oracle")
        axes.fill_between(sizes, means - spread, means + spread, color=_BLUE, alpha=0.2, linewidth=0)
        axes.plot(sizes, means, "o-", color=_BLUE, label="router")
        axes.plot(sizes, [point.static for point in curve.points], "s--", color=_ORANGE, label="best single teacher")
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = [size for size in sizes if size == sizes[-1] or 1.5 * size < sizes[-1]]
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.set_xlabel("calibration prompts the router was fitted to")
        axes.set_ylabel("reward on the hold-out")
        figure.legend(loc="outside upper left", ncols=3)
    first, last = curve.points[0], curve.points[-1]
    said = (
        f"From {first.n_calibration:,} to {last.n_calibration:,} prompts the router's reward goes from "
        f"{first.reward:.3f} to {last.reward:.3f}; the best single teacher has {last.static:.3f}, the oracle "
        f"{curve.oracle:.3f}. {curve.verdict[:1].upper()}{curve.verdict[1:]}."
    )
    return _picture("router-curve", "Reward by calibration size", said, figure)


def hit_rates(hits: Hits) -> Picture:
    """Hit@k: how often a best teacher is among the first k, for the router and for baselines."""
    ks = range(1, len(hits.router) + 1)
    with styled():
        figure, axes = _axes(2.9)
        axes.grid(True)
        axes.plot(ks, hits.router, "o-", color=_BLUE, label="router")
        axes.plot(ks, hits.static, "s--", color=_ORANGE, label="static")
        axes.plot(ks, hits.random, "x-", color=_GREY, label="random")
        axes.set_ylim(0, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("k")
        axes.set_ylabel(f"Hit@k on {hits.n_prompts:,} hold-out prompts")
        figure.legend(loc="outside upper left", ncols=3)
    said = f"Hit@1: router {hits.router[0]:.0%}, static {hits.static[0]:.0%}, random {hits.random[0]:.0%}{_hit3(hits)}."
    return _picture("hit-rates", "Hit@k on the hold-out", said, figure)


def reliability(bins: Sequence[Believed]) -> Picture:
    """Calibration of win probabilities: predicted against observed frequencies."""
    most = max(bin_.n_preferences for bin_ in bins)
    with styled():
        figure, axes = _axes(3.2)
        axes.grid(True)
        axes.plot([0.5, 1], [0.5, 1], color=_GREY, linestyle=":", label="as predicted")
        xs, ys = [bin_.predicted for bin_ in bins], [bin_.observed_frequency for bin_ in bins]
        areas = [12 + 110 * bin_.n_preferences / most for bin_ in bins]
        axes.scatter(xs, ys, s=areas, color=_BLUE, label="router, with number of preferences", zorder=3)
        for bin_, area in zip(bins, areas, strict=True):
            above = (0, 3 + area**0.5 / 2)
            place = (bin_.predicted, bin_.observed_frequency)
            axes.annotate(
                f"{bin_.n_preferences:,}", place, above, textcoords="offset points", ha="center", fontsize=7.5
            )
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.48, min(ys) - 0.05), 1.12)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("predicted win probability")
        axes.set_ylabel("observed on the hold-out")
        figure.legend(loc="outside upper left", ncols=2, markerscale=0.6)
    said = [f"{bin_.predicted:.0%} predicted, {bin_.observed_frequency:.0%} observed" for bin_ in bins]
    return _picture("reliability", "Calibration of win probabilities", f"{'; '.join(said)}.", figure)


def alpha_winners(alphas: Alphas) -> Picture:
    """For each weight of learnability, the share of the grid's prompts on which each teacher is best."""
    shares = np.array([point.winners for point in alphas.points]).T
    with styled():
        figure, axes = _heat(alphas.teachers, [f"{point.alpha:g}" for point in alphas.points], shares, tilt=0)
        for column, point in enumerate(alphas.points):
            box = Rectangle((column - 0.5, point.best - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.4)
            axes.add_patch(box)
        axes.set_xlabel(f"alpha (this run: {alphas.alpha:g}); boxed: the best mean reward")
    said = [f"at alpha {point.alpha:g} {alphas.teachers[point.best]}" for point in alphas.points]
    return _picture(
        "alpha-winners", "Teacher of the best response, by alpha", f"Best mean reward: {', '.join(said)}.", figure
    )


def alpha_strategies(alphas: Alphas) -> Picture:
    """The reward of each strategy at each weight of learnability."""
    names = list(dict.fromkeys(name for point in alphas.points for name in point.strategies))
    with styled():
        figure, axes = _axes(3.2)
        axes.grid(True)
        axes.axvline(alphas.alpha, color=INK, linewidth=0.7, alpha=0.5)
        for name in names:
            points = [(p.alpha, p.strategies[name]) for p in alphas.points if name in p.strategies]
            color, marker, line = _style_of(name)
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=name)
        axes.set_xlabel(f"alpha; the vertical line is this run's, {alphas.alpha:g}")
        axes.set_ylabel("reward on the hold-out")
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2)
    said = [
        f"at alpha {point.alpha:g} " + ", ".join(f"{name} {value:.3f}" for name, value in point.strategies.items())
        for point in (alphas.points[0], alphas.points[-1])
    ]
    return _picture("alpha-strategies", "Rewards of strategies, by alpha", f"Rewards: {'; '.join(said)}.", figure)


def strategies(comparison: Comparison) -> Picture:
    """The hold-out reward of each strategy, with 95% intervals."""
    facts = comparison.strategies
    with styled():
        figure, axes = _rows([fact.strategy for fact in facts], each=0.27)
        axes.grid(True, axis="x")
        for place, fact in enumerate(facts):
            color, _, _ = _style_of(fact.strategy)
            axes.plot([fact.reward.low, fact.reward.high], [place, place], color=color, linewidth=2.4, alpha=0.55)
            axes.plot(fact.reward.mean, place, "o", color=color)
            axes.annotate(
                f"{fact.reward.mean:.3f}", (fact.reward.high, place), (5, 0), textcoords="offset points", va="center"
            )
        axes.margins(x=0.13)
        axes.set_xlabel(f"reward on {comparison.n_holdout:,} hold-out prompts, with 95% intervals")
    said = [f"{f.strategy} {f.reward.mean:.3f} ({f.reward.low:.3f} to {f.reward.high:.3f})" for f in facts]
    return _picture("strategies", "Rewards of strategies", f"{'; '.join(said)}.", figure)


def savings(spent: Savings) -> Picture:
    """The run's spending, beside an estimate if all teachers answered all prompts."""
    panels: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("response tokens", spent.tokens, spent.tokens_generate_all, "{:,.0f}".format)
    ]
    if spent.cost is not None and spent.cost_generate_all:
        panels.append(("US dollars", spent.cost, spent.cost_generate_all, dollars))
    this_run = "this run" if spent.is_all else "this run so far"
    with styled():
        figure = Figure(figsize=(_WIDTH, 0.35 + 0.95 * len(panels)), layout="constrained")
        for axes, (what, mine, all_, form) in zip(
            np.ravel(figure.subplots(len(panels), 1, squeeze=False)), panels, strict=True
        ):
            bars = axes.barh([0, 1], [mine, all_], color=[_BLUE, _GREY], height=0.62)
            axes.bar_label(bars, [f"{form(mine)} ({mine / all_:.0%})", f"about {form(all_)}"], padding=3)
            axes.set_yticks([0, 1], [this_run, "generate all"])
            axes.tick_params(axis="y", length=0)
            axes.invert_yaxis()
            axes.margins(x=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(_counted))
            axes.set_xlabel(what)
    said = [f"{what}: {form(mine)} of about {form(all_)}" for what, mine, all_, form in panels]
    return _picture("savings", "Cost against generate-all", f"{this_run.capitalize()}, {'; '.join(said)}.", figure)


def progress(timeline: Timeline) -> Picture:
    """The progress and speed of each stage over time."""
    n_bins = len(timeline.stages[0].rows)
    unit, seconds = _clock(timeline.seconds)
    edges = np.linspace(0, timeline.seconds / seconds, n_bins + 1)
    minutes = timeline.seconds / n_bins / 60
    with styled():
        figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
        done, pace = figure.subplots(2, 1, sharex=True)
        for stage in timeline.stages:
            rows = np.array(stage.rows)
            colour, line = STAGES[stage.stage].style
            color = COLOURS[colour]
            drawn = np.flatnonzero(rows)
            first, last = drawn[0], drawn[-1] + 1
            share = np.concatenate([[0], np.cumsum(rows)])[first : last + 1] / stage.planned
            done.plot(edges[first : last + 1], share, color=color, linestyle=line, label=stage.stage)
            rates = np.where(rows > 0, rows, np.nan)[first:last] / minutes
            pace.stairs(rates, edges[first : last + 1], baseline=None, color=color, linestyle=line)
        for axes in (done, pace):
            axes.grid(True)
        done.set_ylim(bottom=0)
        # Rule-based scoring is thousands of times faster than generation.
        pace.set_yscale("log")
        pace.minorticks_off()
        done.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        done.set_ylabel("of the stage's rows")
        pace.yaxis.set_major_formatter(FuncFormatter(_counted))
        pace.set_ylabel("rows per minute")
        pace.set_xlabel(f"{unit} since the first job was claimed")
        figure.legend(loc="outside upper left", ncols=3)
    said = [f"{stage.stage} {_of(sum(stage.rows), stage.planned)} rows" for stage in timeline.stages]
    spent = f"In {timeline.seconds / seconds:,.1f} {unit}: {', '.join(said)}."
    return _picture("progress", "Work over time", spent, figure)


def _picture(name: str, title: str, says: str, figure: Figure) -> Picture:
    assert name in FIGURES, name
    return laid_out(Picture(name, title, says, figure))


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _rows(names: Sequence[str], *, each: float = 0.24) -> tuple[Figure, Axes]:
    """Axes with one row per name, the first on top."""
    figure, axes = _axes(0.6 + each * max(len(names), 2))
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _heat(rows: Sequence[str], columns: Sequence[str], shares: Any, *, tilt: int = 35) -> tuple[Figure, Axes]:
    """A heat map with percentages in its cells."""
    figure, axes = _axes(0.95 + 0.24 * len(rows) + (0.35 if tilt else 0))
    for (row, column), share in np.ndenumerate(shares):
        cell = Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=_BLUE, alpha=0.05 + 0.55 * share, linewidth=0)
        axes.add_patch(cell)
        if share:
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks(range(len(columns)), [label(name, most=16) for name in columns])
    if tilt:
        axes.tick_params(axis="x", rotation=tilt)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [label(name) for name in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _of(done: float, planned: int) -> str:
    return f"{done:,.0f}" if round(done) == planned else f"{done:,.0f} of {planned:,}"


def _hit3(hits: Hits) -> str:
    if len(hits.router) <= 3:  # it would be 100% for any scores
        return ""
    return f"; Hit@3: router {hits.router[2]:.0%}, static {hits.static[2]:.0%}, random {hits.random[2]:.0%}"


def _counted(value: float, _: Any) -> str:
    """Format a count for an axis: 1,200 or 3.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _clock(seconds: float) -> tuple[str, float]:
    """The unit of a time axis, and its length in seconds."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return unit, size
    return "seconds", 1.0


def _quality_learnability(report: Report) -> Callable[[], Picture] | None:
    is_scored = any(teacher.quality and teacher.learnability for teacher in report.means)
    unit = report.learnability_unit or ""
    return _if(is_scored and report.means, partial(quality_learnability, unit=report.unit, learnability_unit=unit))


#: All figures in reading order: what draws each from the facts of a report, None where there are none. A file of
#: another name is not taken for a figure.
FIGURES: Mapping[str, Callable[[Report], Callable[[], Picture] | None]] = {
    "teacher-shares": lambda report: _if(
        any(teacher.assigned for teacher in report.facts.teachers) and report.facts.teachers, teacher_shares
    ),
    "group-shares": lambda report: _if(report.groups, group_shares),
    "quality-learnability": _quality_learnability,
    "rewards": lambda report: _if(report.rewards, reward_distributions),
    "strategies": lambda report: _if(report.comparison, strategies),
    "hit-rates": lambda report: _if(report.hits, hit_rates),
    "router-curve": lambda report: _if(report.curve, router_curve),
    "reliability": lambda report: _if(report.reliability, reliability),
    "alpha-winners": lambda report: _if(report.alphas, alpha_winners),
    "alpha-strategies": lambda report: _if(report.alphas if report.comparison else None, alpha_strategies),
    "control-charts": lambda report: _if(control_charts.of(report), partial(control_charts.draw, colours=COLOURS)),
    "savings": lambda report: _if(report.savings, savings),
    "progress": lambda report: _if(report.timeline, progress),
}
