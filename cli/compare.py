"""`persyn compare`: estimated reward, quality and cost of other strategies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec
from sqlalchemy import select

from persyn.analysis import compare as comparison
from persyn.analysis import custom_strategy
from persyn.analysis.compare import Comparison, Reward, StrategyFacts
from persyn.analysis.limits import amount
from persyn.analysis.summary import FEW, NEARLY_ALL, dollars
from persyn.cli.completion import run_names
from persyn.cli.context import JSON, find_run, plain, show, store
from persyn.cli.student import show_students
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.method.learnability import LEARNABILITIES
from persyn.router.kinds.registry import ROUTERS
from persyn.settings import Settings
from persyn.stages.limits import DOLLARS, TOKENS
from persyn.student import outcomes

if TYPE_CHECKING:
    from persyn.analysis.refits import Frozen

_COLUMNS = ("strategy", "reward", "95%", "regret", "closed", "95%", "quality", "learn.", "tokens", "cost")
_UNIT = {DOLLARS: "dollar", TOKENS: "1,000 tokens"}
#: Teachers named per strategy when one table shows several runs.
_MOST_NAMED = 3


@click.command()
@click.argument("names", metavar="[RUN]...", nargs=-1, shell_complete=run_names)
@click.option(
    "--alpha",
    "alphas",
    metavar="A,B,...",
    help="Weights of learnability to compare at, 0 to 1; 0 is quality alone. Default: the run's.",
)
@click.option(
    "--normalise",
    type=click.Choice(["minmax", "zscore", "rank"]),
    help="How raw scores are made comparable within a prompt. Default: the run's.",
)
@click.option(
    "--learnability",
    type=click.Choice(list(LEARNABILITIES)),
    help="The definition of learnability, from what the student's scores hold. Default: the run's.",
)
@click.option(
    "--per",
    type=click.Choice(["token", "character", "response"]),
    help="What the log-likelihood of a response is divided by. Default: the run's.",
)
@click.option(
    "--on",
    type=click.Choice(["answer", "reasoning", "both"]),
    help="The part of a response that learnability is computed on, where the teacher reasoned. Default: the run's.",
)
@click.option("--refit", is_flag=True, help="Also fit a router of every kind at each alpha.")
@click.option(
    "--students", "by_students", is_flag=True, help="Compare trained students; of all runs if no RUN is given."
)
@JSON
def compare(names: tuple[str, ...], by_students: bool, as_json: bool, **reward: Any) -> None:
    """Compare strategies for each RUN on its hold-out prompts, from what is stored: nothing is generated.

    Several runs or weights are shown in one table. Rewards, with 95% intervals, are measured on
    the hold-out prompts; a strategy learns from the calibration prompts alone. 'regret' is the reward
    of the oracle minus that of the strategy, 'closed' the part of the gap between the best single
    teacher (static) and the oracle that it closes; --json has an interval of each. 'persyn' is the
    run's router, fitted to the run's own reward. A custom strategy (kind = "python") scores the
    hold-out prompts on this host. Where the teachers' costs are known, a second table shows the
    router within several budgets.

    With --students, it compares the students that were trained on these runs' datasets
    and evaluated ('persyn student'); runs that differ only in their seeds are combined.

    \b
    persyn compare first --alpha 0,0.2,0.4 --refit
    persyn compare --students
    """
    if by_students:
        if any(reward.values()):
            raise UsageError("--students cannot be combined with other options")
        _students(names, as_json)
        return
    if not names:
        raise UsageError("give the name of a run; 'persyn run list' lists them")
    how = reward["normalise"], reward["per"], reward["on"], reward["learnability"]
    rewards = [Reward(alpha, *how) for alpha in _alphas(reward["alphas"])]
    compared: list[Comparison] = []
    settings = Settings.from_environment()
    with store() as database:
        for name in names:
            with database.read() as session:
                run_id = find_run(session, name).id
            frozen = _freeze(database, name, rewards[0]) if reward["refit"] else None
            scores = [
                {
                    **(frozen.scores(each.alpha, each.how) if frozen else {}),
                    **custom_strategy.ask(database, run_id, settings, each),
                }
                for each in rewards
            ]
            with database.read() as session:
                run = find_run(session, name)
                compared += [
                    comparison.compare(session, run, each, scores=more)
                    for each, more in zip(rewards, scores, strict=True)
                ]
    if as_json:
        click.echo(msgspec.json.encode(compared).decode())
        return
    _show(compared)


def _students(names: tuple[str, ...], as_json: bool) -> None:
    with store() as database, database.read() as session:
        runs = [find_run(session, name) for name in names] or list(session.scalars(select(Run).order_by(Run.id)))
        show_students(outcomes.compare(session, runs), as_json=as_json)


def _freeze(database: Database, run: str, reward: Reward) -> Frozen:
    from persyn.analysis import refits  # imports torch

    with database.read() as session:
        grid = refits.read(session, find_run(session, run), reward)
    return refits.freeze(grid, Settings.from_environment().home)


def _alphas(text: str | None) -> list[float | None]:
    if text is None:
        return [None]
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = []
    if not alphas or not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise UsageError(f"--alpha takes numbers from 0 to 1, such as 0,0.2,0.4; got {text!r}")
    return list(alphas)


def _show(compared: Sequence[Comparison]) -> None:
    """Print one table for all comparisons, with columns for the run and alpha where they differ."""
    for one in compared:
        measure = "" if one.learnability == "log_likelihood" else f", learnability {one.learnability}"
        measure += "" if one.learnability_per == "token" else f", learnability per {one.learnability_per}"
        measure += "" if one.learnability_on == "both" else f", learnability on {one.learnability_on}"
        click.echo(
            f"run {plain(one.run)}, alpha {one.alpha:g}, {one.normalise}{measure}: {one.n_holdout:,} hold-out prompts, "
            f"{one.n_calibration:,} calibration prompts"
        )
    for name in dict.fromkeys(one.run for one in compared if one.is_partial):
        click.echo(f"warning: {comparison.partial_warning(plain(name))}", err=True)
    click.echo()
    has_runs = len({one.run for one in compared}) > 1
    has_alphas = len({(one.run, one.alpha) for one in compared}) > len({one.run for one in compared})
    rows = [
        (one.run if has_runs else None, f"{one.alpha:g}" if has_alphas else None, *_row(fact))
        for one in compared
        for fact in one.strategies
    ]
    show(("run", "alpha", *_COLUMNS), rows, as_json=False, skip_empty=True)
    click.echo()
    _show_shares(compared, has_runs=has_runs, has_alphas=has_alphas)
    for one in compared:
        _show_frontier(one)
    for one in compared:
        which = f"{plain(one.run)}, alpha {one.alpha:g}: " if len(compared) > 1 else ""
        for remark in _remarks(one):
            click.echo(which + remark)


def _show_shares(compared: Sequence[Comparison], *, has_runs: bool, has_alphas: bool) -> None:
    """Print each strategy's shares by teacher: one row per teacher, or one row per strategy for several comparisons."""
    if len(compared) == 1:
        facts = compared[0].strategies
        teachers = sorted({name for fact in facts for name in fact.shares})
        shares = [(name, *(f"{fact.shares.get(name, 0.0):.0%}" for fact in facts)) for name in teachers]
        show(("teacher", *(fact.strategy for fact in facts)), shares, as_json=False)
        return
    rows = [
        (
            one.run if has_runs else None,
            f"{one.alpha:g}" if has_alphas else None,
            fact.strategy,
            ", ".join(f"{name} {share:.0%}" for name, share in list(fact.shares.items())[:_MOST_NAMED]),
        )
        for one in compared
        for fact in one.strategies
    ]
    show(("run", "alpha", "strategy", "top teachers"), rows, as_json=False, skip_empty=True)


def _show_frontier(one: Comparison) -> None:
    """Print what the router would gain within budgets."""
    if not one.frontier:
        return
    unit = one.frontier[0].unit
    rows = [
        (
            amount(point.cost, unit),
            f"{point.reward.mean:.3f}",
            f"{point.reward.low:.2f}-{point.reward.high:.2f}",
            f"{point.price:.2g}" if point.price else None,
            ", ".join(f"{name} {share:.0%}" for name, share in list(point.shares.items())[:_MOST_NAMED]),
        )
        for point in one.frontier
    ]
    click.echo(f"\nrun {plain(one.run)}: the router within a budget ([strategy] budget)")
    columns = "cost of 1,000 prompts", "reward", "95%", f"gain per {_UNIT[unit]}", "top teachers"
    show(columns, rows, as_json=False, skip_empty=True)
    click.echo()


def _remarks(one: Comparison) -> Iterator[str]:
    shares = {fact.strategy: fact.shares for fact in one.strategies}
    for name in ("persyn", *(name for name, kind in ROUTERS.items() if kind.reads)):
        if name not in shares or one.n_holdout < FEW:
            continue
        most = max(shares[name], key=shares[name].__getitem__)
        if shares[name][most] > NEARLY_ALL >= shares["oracle"].get(most, 0.0):
            yield f"{name} nearly always chooses {plain(most)}: it barely distinguishes between these prompts"
    if not one.is_own and "persyn" in shares:
        yield "persyn: the router was fitted to the run's own reward, not to this one; --refit fits others to this one"
    for note in one.notes:
        yield f"unavailable: {note}"


def _row(fact: StrategyFacts) -> tuple[str | None, ...]:
    return (
        fact.strategy,
        f"{fact.reward.mean:.3f}",
        f"{fact.reward.low:.2f}-{fact.reward.high:.2f}",
        f"{fact.regret.mean:.3f}",
        f"{fact.gap_closed.mean:+.0%}" if fact.gap_closed else None,
        f"{fact.gap_closed.low:+.0%} {fact.gap_closed.high:+.0%}" if fact.gap_closed else None,
        f"{fact.quality.mean:.3f}",
        f"{fact.learnability.mean:.3f}" if fact.learnability else None,
        None if fact.tokens is None else f"{fact.tokens:,.0f}",
        None if fact.cost is None else dollars(fact.cost),
    )
