"""`persyn compare`: what other strategies would have come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec
from sqlalchemy import select

from cli.completion import run_names
from cli.open import JSON, find_run, plain, show, store
from cli.student import show_students
from persyn import compare as comparison
from persyn import own_strategy, students
from persyn.compare import Comparison, StrategyFacts
from persyn.config import Per
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.rewards import Matrix, Normalisation
from persyn.settings import Settings
from persyn.summary import FEW, NEARLY_ALL, dollars

if TYPE_CHECKING:
    from persyn.hindsight import Frozen


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
    "--per",
    type=click.Choice(["token", "character", "response"]),
    help="What the log-likelihood of a response is divided by. Default: the run's.",
)
@click.option("--refit", is_flag=True, help="Also fit a head anew at each alpha, and ask the nearest neighbours.")
@click.option(
    "--students", "by_students", is_flag=True, help="Compare by what students became; of all runs, if none is given."
)
@JSON
def compare(names: tuple[str, ...], by_students: bool, as_json: bool, **reward: Any) -> None:
    """Compare strategies for each RUN on its hold-out prompts, from what is stored: nothing is generated.

    Rewards, with 95% intervals, are of the hold-out prompts; what a strategy goes by it learns from
    the calibration prompts alone. 'regret' is what is lacking to the oracle, 'closed' the part of the
    way from the best single teacher (static) to it; --json has an interval of each. 'persyn' is the
    run's router, which was fitted to the run's own reward. A run whose strategy is a python function
    shows that too: it is asked about the hold-out prompts, here.

    With --students it is the students that are compared, those that were trained on these runs' datasets
    and evaluated ('persyn student'): runs of one strategy and alpha, of several seeds perhaps, are taken together.

    \b
    persyn compare first --alpha 0,0.2,0.4 --refit
    persyn compare --students
    """
    if by_students:
        if any(reward.values()):
            raise UsageError("--students compares what was trained; no other option has a part in it")
        _students(names, as_json)
        return
    if not names:
        raise UsageError("give the name of a run; 'persyn run list' shows which there are")
    alphas, how, per = _alphas(reward["alphas"]), reward["normalise"], reward["per"]
    compared: list[Comparison] = []
    with store() as database:
        for name in names:
            frozen = _freeze(database, name, per) if reward["refit"] else None
            scores = [
                {**(frozen.scores(alpha, how) if frozen else {}), **_own(database, name, alpha, how, per)}
                for alpha in alphas
            ]
            with database.read() as session:
                run = find_run(session, name)
                compared += [
                    comparison.compare(session, run, alpha=alpha, how=how, per=per, scores=more)
                    for alpha, more in zip(alphas, scores, strict=True)
                ]
    if as_json:
        click.echo(msgspec.json.encode(compared).decode())
        return
    for one in compared:
        _show(one)


def _students(names: tuple[str, ...], as_json: bool) -> None:
    with store() as database, database.read() as session:
        runs = [find_run(session, name) for name in names] or list(session.scalars(select(Run).order_by(Run.id)))
        show_students(students.compare(session, runs), as_json=as_json)


def _freeze(database: Database, run: str, per: Per | None) -> Frozen:
    from persyn import hindsight  # brings torch

    with database.read() as session:
        grid = hindsight.read(session, find_run(session, run), per=per)
    return hindsight.freeze(grid, Settings.from_environment().home)


def _own(
    database: Database, name: str, alpha: float | None, how: Normalisation | None, per: Per | None
) -> dict[str, Matrix | str]:
    """What the run's own strategy says of the hold-out prompts, if it has one."""
    with database.read() as session:
        question = own_strategy.read(session, find_run(session, name), alpha=alpha, how=how, per=per)
    return {} if question is None else {question.spec.model: own_strategy.scores(question, Settings.from_environment())}


def _alphas(text: str | None) -> list[float | None]:
    if text is None:
        return [None]
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = []
    if not alphas or not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise UsageError(f"--alpha takes numbers from 0 to 1, like 0,0.2,0.4, got {text!r}")
    return list(alphas)


def _show(one: Comparison) -> None:
    per = "" if one.learnability_per == "token" else f", learnability per {one.learnability_per}"
    click.echo(
        f"run {one.run}, alpha {one.alpha:g}, {one.normalise}{per}: {one.n_holdout} hold-out prompts, "
        f"{one.n_calibration} calibration prompts"
    )
    has_cost = any(fact.cost is not None for fact in one.strategies)
    columns = (
        "strategy",
        "reward",
        "95%",
        "regret",
        "closed",
        "95%",
        "quality",
        "learn.",
        "tokens",
        *["cost"] * has_cost,
    )
    show(columns, [_row(fact)[: len(columns)] for fact in one.strategies], as_json=False)
    click.echo()
    teachers = sorted({name for fact in one.strategies for name in fact.shares})
    shares = [(name, *(_share(fact.shares.get(name, 0.0)) for fact in one.strategies)) for name in teachers]
    show(("asks", *(fact.strategy for fact in one.strategies)), shares, as_json=False)
    for fact in one.strategies:
        most = max(fact.shares, key=fact.shares.__getitem__)
        if fact.strategy in ("persyn", "head") and one.n_holdout >= FEW and fact.shares[most] > NEARLY_ALL:
            click.echo(f"{fact.strategy} asks {plain(most)} nearly always: it tells these prompts hardly apart")
    if not one.is_own and any(fact.strategy == "persyn" for fact in one.strategies):
        click.echo("persyn: its router was fitted to the run's own reward, not to this one; --refit fits a head to it")
    for note in one.notes:
        click.echo(f"not there: {note}")
    click.echo()


def _row(fact: StrategyFacts) -> tuple[str, ...]:
    return (
        fact.strategy,
        f"{fact.reward.mean:.3f}",
        f"{fact.reward.low:.2f}-{fact.reward.high:.2f}",
        f"{fact.regret.mean:.3f}",
        f"{fact.closed.mean:+.0%}" if fact.closed else "-",
        f"{fact.closed.low:+.0%} {fact.closed.high:+.0%}" if fact.closed else "-",
        f"{fact.quality.mean:.3f}",
        f"{fact.learnability.mean:.3f}",
        "-" if fact.tokens is None else f"{fact.tokens:,.0f}",
        "-" if fact.cost is None else dollars(fact.cost),
    )


def _share(share: float) -> str:
    return f"{share:.0%}"
