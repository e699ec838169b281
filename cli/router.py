"""`persyn router`: show a run's router and its learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec

from persyn.cli.context import JSON, RUN, cell, find_run, plain, show, store
from persyn.db.results import Router
from persyn.errors import UsageError
from persyn.settings import Settings

#: What is measured on the hold-out; routers of earlier versions also have nearest neighbours.
_MEASURED = ("router", "static", "random", "neighbours", "oracle")


@click.group()
def router() -> None:
    """Show routers and their learning curves."""


@router.command("show", short_help="Show a run's router and its metrics.")
@RUN
@JSON
def show_router(run: str, as_json: bool) -> None:
    """Show RUN's router: its kind, what it reads, how it was chosen and fitted, and its metrics on the hold-out.

    Where a kind was chosen (kind = "auto"), a table has the mean reward of each candidate on the calibration prompts,
    each routed by a router that was fitted without it, and the gain over the best single teacher with its standard
    error.
    """
    with store() as database, database.read() as session:
        found = find_run(session, run)
        row = session.get(Router, found.router_id) if found.router_id is not None else None
        if row is None:
            raise UsageError(f"run {run!r} has no router yet")
        measured = {name: row.metrics.get(name) for name in _MEASURED if name in row.metrics}
        facts = {
            "kind": row.kind,
            "backbone": row.backbone or None,
            "tune": row.tune,
            "path": row.path,
            "sha256": row.sha256,
            **{name: value for name, value in row.metrics.items() if name not in (*_MEASURED, "kind", "tune")},
        }
    if as_json:
        click.echo(msgspec.json.encode({**facts, **measured}).decode())
        return
    for name, value in facts.items():
        if name not in ("candidates", "why") and value not in (None, "", [], {}):
            click.echo(f"{name}: {cell(value)}")
    if candidates := facts.get("candidates"):
        show_candidates(candidates, facts["why"])
    columns = ("hit1", "hit3", "pair_accuracy", "routed_reward", "regret", "calibration_error")
    rows = [(name, *(values.get(column) for column in columns)) for name, values in measured.items() if values]
    if rows:
        click.echo()
        show(("on hold-out", *columns), rows, as_json=False, skip_empty=True)


def show_candidates(candidates: Sequence[Mapping[str, Any]], why: str) -> None:
    """Print the candidates of a choice, and why one was taken."""
    rows = [
        (each["kind"], f"{each['reward']:.3f}", f"{each['gain']:+.3f}", f"{each['error']:.3f}") for each in candidates
    ]
    click.echo()
    show(("candidate", "reward", "gain", "+-"), rows, as_json=False)
    click.echo(f"chosen: {plain(why)}")


@router.command(short_help="Show a learning curve: reward by calibration size.")
@RUN
@JSON
def curve(run: str, as_json: bool) -> None:
    """Show RUN's learning curve: the reward of routers of its router's kind, fitted to 25, 50,
    100, ..., half and all of its calibration prompts, on its hold-out.

    What the router's models compute of a prompt is computed once and cached.
    """
    home = Settings.from_environment().home
    with store() as database, database.read() as session:
        row = find_run(session, run)
        from persyn.analysis import refits  # imports torch; an unknown run is reported before that

        grid = refits.read(session, row)
    found = refits.curve(run, refits.freeze(grid, home))
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    click.echo(f"run {run}, {found.kind}: {found.n_holdout} hold-out prompts, the oracle's reward {found.oracle:.3f}")
    rows = [
        (
            p.n_calibration,
            f"{p.reward:.3f}",
            f"{p.deviation:.3f}",
            f"{p.static:.3f}",
            "-" if p.gap_closed is None else f"{p.gap_closed:+.0%}",
        )
        for p in found.points
    ]
    show(("calibration", "reward", "+-", "static", "closed"), rows, as_json=False)
    click.echo(found.verdict)
