"""`persyn plan`: estimate the costs of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import msgspec

from persyn.analysis import plan as planning
from persyn.analysis import planned_scores
from persyn.analysis.plan import Amount, Basis, Plan
from persyn.cli.beforehand import require_fit
from persyn.cli.context import JSON, show, store_or_empty, warn
from persyn.cli.progress import counting_rows
from persyn.cli.waiting import waiting
from persyn.config import BudgetTable, Limits, RunConfig
from persyn.db import lookup
from persyn.db.connect import Database
from persyn.jobs import expenses
from persyn.jobs.expenses import Amount as Spent
from persyn.runs import preflight, run_file

_AMOUNT = ("requests", "tokens in", "tokens out", "US dollars", "hours")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@JSON
def plan(config: Path, as_json: bool) -> None:
    """Estimate the requests, tokens, cost and time of the run in file CONFIG; nothing is started or stored.

    The file, its prompts, this host and the servers are checked as by 'run start': an error here would be an error
    there. Prompts take as much space in the folder for temporary
    files (TMPDIR) as in a store. Stored responses of the same teacher versions to the same prompts are reused.
    Lengths and speed are those of each teacher's responses in the store; without any, a response is assumed to have
    max_tokens tokens, and a token 4 characters, with 5 tokens more in each turn. For an existing run, only the
    remaining work is estimated.
    """
    wanted = run_file.read(config)
    with store_or_empty() as database, counting_rows() as count, waiting("identifying models and counting prompts"):
        identify = partial(preflight.identify, say=warn)
        found = planning.of_config(database, wanted, identify=identify, on_rows=count, say=warn)
        spent = spent_by(database, wanted.run.name) if found.state else Spent()
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        show_plan(found, wanted, spent)
    if found.state is None:
        require_fit(wanted)


def show_plan(found: Plan, config: RunConfig, spent: Spent) -> None:
    """Print a plan, and which limits of the run's budget it exceeds with what the run has spent."""
    _show(found)
    _warn_of_budget(found, config.budget or BudgetTable(), spent)


def _show(found: Plan) -> None:
    stands = f"{found.state}; 'persyn run status {found.name}' shows its progress" if found.state else "not started"
    click.echo(f"run {found.name}: {stands}")
    click.echo(
        f"{found.prompts:,} prompts, {found.calibration:,} of them for all teachers; strategy {found.strategy}\n"
    )
    shares = [share for share in found.shares if share.stage != "all"]
    rows = [(s.stage, s.teacher, s.prompts, s.stored, *_cells(s.ask)) for s in shares]
    show(("stage", "teacher", "prompts", "stored", *_AMOUNT), rows, as_json=False, skip_empty=True, separators=True)
    scores = {s.teacher: (s.scores_stored, s.scores_to_make) for s in shares if s.stage == "calibrate"}
    grounds = [
        (b.teacher, *scores.get(b.teacher, (None, None)), b.load_seconds, _lengths_from(b)) for b in found.teachers
    ]
    columns = ("teacher", "scores stored", "scores to compute", "load seconds", "lengths from")
    click.echo()
    show(columns, grounds, as_json=False, skip_empty=True, separators=True)
    totals: dict[str, Amount | None] = {"this run": found.least}
    if found.undecided:
        totals = {"with the cheapest teacher": found.least, "at an even split": found.even}
        totals["with the most expensive"] = found.most
    totals["all teachers answer all"] = found.generate_all
    click.echo()
    rows = [(name, *_cells(each)) for name, each in totals.items() if each]
    show(("in all", *_AMOUNT), rows, as_json=False, skip_empty=True, separators=True)
    click.echo()
    _explain(found)


def spent_by(database: Database, run: str) -> Spent:
    """What a run has spent."""
    with database.read() as session:
        amounts = expenses.amounts(session, lookup.run(session, run).id)
    _, _, spent = next(expenses.scopes(BudgetTable(), amounts, {}))
    return spent


def _warn_of_budget(found: Plan, limits: Limits, spent: Spent) -> None:
    """Say which limits of the whole run the plan exceeds, or may exceed, with what is spent."""
    for key, limit, figures in (
        ("tokens", limits.tokens, [each.prompt_tokens + each.response_tokens for each in (found.least, found.most)]),
        ("usd", limits.usd, [found.least.cost, found.most.cost]),
        ("engine_hours", limits.engine_hours, [found.least.gpu_hours, found.most.gpu_hours]),
    ):
        least, most = figures
        if limit is None or most is None or most <= (left := limit - getattr(spent, key)):
            continue
        how = "is more than" if least is not None and least > left else "may be more than"
        allowed = f"[budget] {key} = {limit:,g} allows"
        rest = f"what {allowed} after {getattr(spent, key):,g}" if getattr(spent, key) else allowed
        click.echo(f"the plan {how} {rest}: the run would stop there")


def _explain(found: Plan) -> None:
    """Explain the limits of the estimates."""
    if not found.most.responses:
        click.echo("no prompts are left to generate")
        return
    if found.undecided:
        who = "one of them is chosen" if found.even is None else "teachers are assigned"
        click.echo(f"undecided: if that teacher alone answered these prompts; {who} after calibration")
    if any(basis.response_tokens_from == "max_tokens" for basis in found.teachers):
        click.echo("lengths from max_tokens: upper bounds, because the store has no response of that teacher")
    if any(basis.prompt_tokens_from == "characters" for basis in found.teachers):
        click.echo("lengths from characters: estimated at 4 characters per token, and 5 tokens more per turn")
    if scores := planned_scores.besides_grid(found.shares):
        click.echo(f"responses are scored as they come: up to {scores:,} scores besides those of calibration prompts")
    if found.most.cost is None:
        click.echo("cost unknown: every teacher needs price_in and price_out")
    if found.most.engine_hours is None:
        click.echo("engine hours unknown: the store has no finished jobs of some teacher to derive its speed from")
    click.echo("not included: loading models, scoring and the router")


def _lengths_from(basis: Basis) -> str:
    return ", ".join(dict.fromkeys((basis.prompt_tokens_from, basis.response_tokens_from)))


def _cells(amount: Amount) -> list[float | None]:
    counts = [round(count) for count in (amount.responses, amount.prompt_tokens, amount.response_tokens)]
    return [*counts, amount.cost, amount.engine_hours]
