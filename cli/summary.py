"""Print the figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import click
from sqlalchemy.orm import Session

from persyn.analysis import recalibration, spending, watch
from persyn.analysis.realised import figures
from persyn.analysis.spending import Figures, Spending, Standing
from persyn.analysis.summary import MUCH, Summary, facts
from persyn.analysis.verdict import RunVerdict
from persyn.cli.context import plain
from persyn.cli.context import show as table
from persyn.cli.progress import wait_line
from persyn.db.catalog import Run, RunState
from persyn.jobs import owner
from persyn.runs import extension, scheduling

__all__ = ["facts", "show"]


def show(session: Session, run: Run) -> None:
    """Print a run's stages, failures, teachers, workers, router and savings."""
    found = facts(session, run)
    error = f" ({plain(found.error)})" if found.error else ""
    state, notes = _state(session, run)
    costs = spending.facts(session, run)
    priority = f", priority {run.priority}" if run.priority else ""
    click.echo(f"run {found.name}: {state}, {found.prompts:,} prompts{priority}{error}")
    for each in extension.of_run(session, run):
        click.echo(plain(f"extension {each.number}: {each.prompts:,} prompts were added from {', '.join(each.files)}"))
    for said in recalibration.words(session, run):
        click.echo(plain(said))
    for note in [*notes, *(paused(run, costs)[1:] if run.state is RunState.PAUSED else [])]:
        click.echo(note)
    _stages(found)
    _failures(session, run, found)
    _teachers(found)
    _workers(found)
    _router(found)
    _verdict(found)
    for said in (*found.limits, *found.second_choices):
        click.echo(plain(said))
    _realised(found)
    _spending(costs)
    _budget(costs.budget)
    _savings(found)


def paused(run: Run, costs: Spending) -> list[str]:
    """Why a run is paused, what the rest would cost, and how to continue."""
    rest = costs.rest_words
    return [
        plain(f"run {run.name} is paused: {run.error}"),
        *([f"the rest would take about {rest}"] if rest is not None else []),
        f"to continue: {scheduling.how_to_continue(run)}",
    ]


def _state(session: Session, run: Run) -> tuple[str, list[str]]:
    """The state of a run, and who works it: a killed worker reports nothing."""
    seen = watch.snapshot(session, run)
    holders = {held.worker for held in seen.held if held.lease_seconds > 0}
    at_work = len(holders) - len(owner.dead(holders))
    is_waiting = any(wait.retry_seconds > 0 for wait in seen.waits)
    state = watch.effective_state(run.state, holders, is_waiting=is_waiting)
    notes = [wait_line(wait) for wait in seen.waits]
    if state == "stopped":
        notes.append(f"no worker holds a job of the run; if this persists, continue it: persyn run resume {run.name}")
    elif run.state is RunState.RUNNING and at_work:
        notes.append(f"{at_work} worker{'s hold' if at_work > 1 else ' holds'} jobs of the run")
    return state, notes


def _stages(found: Summary) -> None:
    rows = [(s.stage, s.total, s.done, s.failed, s.pending, s.seconds, s.work_seconds) for s in found.stages]
    click.echo()
    table(("stage", "rows", "done", "failed", "pending", "elapsed s", "worked s"), rows, as_json=False, separators=True)


def _failures(session: Session, run: Run, found: Summary) -> None:
    """Print the reasons and shares of failed rows, if any."""
    spared = [stage.stage for stage in found.stages if not stage.failed]
    if len(spared) < len(found.stages):
        counted = watch.count_rows(session, run, known=spared)
        click.echo()
        rows = [(failure.stage, failure.reason, failure.rows) for failure in counted.failures]
        table(("failed in", "reason", "rows"), rows, as_json=False, separators=True)
        for shortfall in watch.shortfalls(counted):
            click.echo(plain(str(shortfall)))


def _teachers(found: Summary) -> None:
    rows = [
        (
            t.teacher,
            t.assigned,
            t.quality,
            t.learnability,
            t.reward,
            t.tokens,
            t.reused_tokens or None,
            _share(t.truncated),
            None if t.reasoning_tokens is None else round(t.reasoning_tokens),
            _share(t.reasoning_share),
        )
        for t in found.teachers
    ]
    columns = (
        "teacher",
        "prompts",
        "quality",
        "learnability",
        "reward",
        "tokens",
        "reused",
        "cut off",
        "reasoning",
        "of tokens",
    )
    click.echo()
    table(columns, rows, as_json=False, skip_empty=True, separators=True)
    _doubtful(found)
    if found.collapsed:
        click.echo(
            f"{plain(found.collapsed)} received nearly every routed prompt: the router barely distinguishes "
            f"between prompts. 'persyn compare {found.name}' shows the cost of this"
        )


def _doubtful(found: Summary) -> None:
    """Print warnings about the quality of the dataset."""
    if cut := [plain(t.teacher) for t in found.teachers if (t.truncated or 0) > MUCH]:
        click.echo(
            f"of the responses of {', '.join(cut)} more than {MUCH:.0%} are cut off at max_tokens; "
            f"'persyn export {found.name} --finish-reason stop' leaves them out"
        )
    if unfinished := {t.teacher: t.unfinished for t in found.teachers if t.unfinished}:
        counted = ", ".join(f"{plain(name)} {count:,}" for name, count in unfinished.items())
        click.echo(
            f"ended inside their reasoning, without an answer: {counted}; a larger max_tokens leaves room for it"
        )
    if found.rejected:
        click.echo(f"{found.rejected:,} prompts have no correct response and no row in the dataset")
    if sampled := [(t.teacher, t.samples, t.accepted) for t in found.teachers if t.samples is not None]:
        parts = (f"{plain(name)} {samples:.1f} ({accepted or 0:.0%})" for name, samples, accepted in sampled)
        click.echo(f"samples per assigned prompt (prompts accepted): {', '.join(parts)}")
    if found.wrong:
        click.echo(
            f"{found.wrong:,} of the assigned responses are known to be wrong; "
            f"'persyn export {found.name} --drop-wrong' leaves them out"
        )


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _workers(found: Summary) -> None:
    if len(found.workers) < 2:
        return  # a single worker waits for nobody; --json includes its figures
    rows = [
        (owner.short(w.worker), w.claims, w.loads, w.load_seconds, w.work_seconds, w.idle_seconds)
        for w in found.workers
    ]
    click.echo()
    table(("worker", "jobs", "loads", "loading s", "working s", "idle s"), rows, as_json=False)


def _router(found: Summary) -> None:
    if not found.router:
        return
    rows = []
    for name in ("router", "static", "random"):
        measured = found.router.get(name)
        if measured:
            rows.append((name, measured.get("hit1"), measured.get("hit3"), measured.get("routed_reward")))
    if rows:
        click.echo()
        table(("on hold-out", "Hit@1", "Hit@3", "reward"), rows, as_json=False, skip_empty=True)
    if why := found.router.get("why"):
        click.echo(f"router: {plain(why)}")


def _verdict(found: Summary) -> None:
    """Print whether routing pays; 'persyn router verdict' has the figures."""
    if found.verdict:
        click.echo()
        say_verdict(found.verdict)


def say_verdict(found: RunVerdict) -> None:
    """Print a verdict in words."""
    click.echo(plain(f"verdict: {found.says}"))
    for said in (*([found.decided] if found.decided else []), *found.warnings):
        click.echo(plain(f"  {said}"))


def _realised(found: Summary) -> None:
    if not found.realised:
        return
    rows = [
        (
            each.teacher,
            *figures(each.predicted),
            *figures(each.realised),
            each.difference_words,
            each.chart and each.chart.words,
        )
        for each in found.realised
    ]
    click.echo()
    columns = ("teacher", "predicted quality", "prompts", "realised quality", "prompts", "difference (95%)", "chart")
    table(columns, rows, as_json=False, skip_empty=True, separators=True)
    for each in found.realised:
        if each.warning:
            click.echo(plain(each.warning))


def _spending(costs: Spending) -> None:
    """Print what was planned, spent and, until the run is done, will have been spent."""
    planned = [model for model in costs.models if model.planned or model.requests]
    if not planned:
        return
    rows = [
        (
            model.stage,
            model.model,
            model.requests,
            *_compared(model.planned, model.spent, model.forecast, costs.is_done),
        )
        for model in planned
    ]
    if len(rows) > 1:
        rows.append(("all", "", sum(model.requests for model in planned), *_compared_all(costs)))
    last = "off" if costs.is_done else "forecast"
    measures = ("tokens", "US dollars", "hours")
    columns = [column for name in measures for column in (f"{name} planned", "spent", last)]
    click.echo()
    table(("stage", "model", "requests", *columns), rows, as_json=False, skip_empty=True, separators=True)
    ranges = [
        f"{plain(m.model)} {m.planned_low:,.0f} to {m.planned_high:,.0f}"
        for m in planned
        if m.stage == "generate" and m.planned_low is not None
    ]
    if ranges:
        click.echo(f"tokens planned to generate, in intervals of 95%: {', '.join(ranges)}")
    if costs.estimated:
        click.echo(f"counted by an upper estimate: {', '.join(costs.estimated)}")


def _compared_all(costs: Spending) -> list[float | str | None]:
    return _compared(
        costs.planned, costs.spent_as_planned if costs.is_done else costs.spent, costs.forecast, costs.is_done
    )


def _compared(
    planned: Figures | None, spent: Figures, forecast: Figures | None, is_done: bool
) -> list[float | str | None]:
    """Planned, spent, and forecast or, at the end, by how much the plan was off, of each measure."""
    cells: list[float | str | None] = []
    for name, digits in (("tokens", 0), ("usd", 4), ("engine_hours", 4)):
        values = [None if figures is None else getattr(figures, name) for figures in (planned, spent, forecast)]
        was, now, then = (None if value is None else round(value, digits or None) for value in values)
        share = spending.off(was, now)
        cells += [was, now or (None if was is None else now), None if share is None else f"{share:+.0%}"]
        if not is_done:
            cells[-1] = then
    return cells


def _budget(standings: Sequence[Standing]) -> None:
    if not standings:
        return
    rows = [
        (
            f"{plain(each.scope)}: {each.key}",
            f"{each.limit:%Y-%m-%d %H:%M} UTC" if isinstance(each.limit, datetime) else each.limit,
            each.spent,
            each.held or None,
            None if isinstance(each.limit, datetime) or each.spent is None else max(0, each.limit - each.spent),
        )
        for each in standings
    ]
    click.echo()
    table(("budget of", "limit", "spent", "in flight", "left"), rows, as_json=False, skip_empty=True, separators=True)


def _savings(found: Summary) -> None:
    if found.tokens_generate_all:
        share = found.tokens / found.tokens_generate_all
        reused = f"; {found.reused_tokens:,} more were reused from the store" if found.reused_tokens else ""
        click.echo(
            f"\ntokens generated: {found.tokens:,}, about {share:.0%} of the {found.tokens_generate_all:,} "
            f"if all teachers answered all prompts{reused}"
        )
