"""`persyn router`: show a run's router and its learning curve, export and import it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from persyn.analysis import verdict as verdicts
from persyn.analysis.verdict import between
from persyn.cli.context import JSON, RUN, cell, find_run, plain, show, store
from persyn.cli.summary import say_verdict
from persyn.db.results import Router
from persyn.errors import UsageError
from persyn.method.verdict import Verdict
from persyn.runs import fitted_router
from persyn.settings import Settings

#: What is measured on the hold-out; routers of earlier versions also have nearest neighbours.
_MEASURED = ("router", "static", "random", "neighbours", "oracle")


@click.group()
def router() -> None:
    """Show routers and their learning curves, export and import them."""


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


@router.command("export", short_help="Write a run's router to a file.")
@RUN
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def export_router(run: str, file: Path) -> None:
    """Write RUN's router to FILE, for runs of the same teachers, student and reward, also in other stores.

    FILE is a zip archive with safetensors and JSON: the router's checkpoint, the versions of the teachers, the student
    and the scorers, and the verdict on it. It has no prompts and no responses, but frequent words of the calibration
    prompts if the router reads words, and labels if it reads fields.
    """
    with store() as database, database.read() as session:
        learned = fitted_router.export(session, find_run(session, run), file, Settings.from_environment().home)
    names = ", ".join(teacher["name"] for teacher in learned.teachers)
    click.echo(f"router of run {run} ({learned.router.kind}, verdict {learned.verdict!r}; teachers {names}): {file}")


@router.command("import", short_help="Store a router that was exported.")
@click.argument("file", type=click.Path(path_type=Path))
def import_router(file: Path) -> None:
    """Store the router in FILE, which 'persyn router export' has written, for runs that use it without calibration.

    Such a run has the printed key in its file. Its teachers, student and reward must be those that the router was
    fitted to.
    """
    with store() as database:
        found = fitted_router.import_from(database, file, Settings.from_environment().home)
    click.echo(f'to use the router, write into a run\'s file:\n\n[router]\nfitted = "{found}"')


def show_candidates(candidates: Sequence[Mapping[str, Any]], why: str) -> None:
    """Print the candidates of a choice, and why one was taken."""
    rows = [
        (each["kind"], f"{each['reward']:.3f}", f"{each['gain']:+.3f}", f"{each['error']:.3f}") for each in candidates
    ]
    click.echo()
    show(("candidate", "reward", "gain", "+-"), rows, as_json=False)
    click.echo(f"chosen: {plain(why)}")


@router.command(short_help="Judge whether routing pays.")
@RUN
@click.option("--by", metavar="FIELD", help="Field of the prompts' rows, or source, to group prompts by.")
@JSON
def verdict(run: str, by: str | None, as_json: bool) -> None:
    """Judge whether routing pays in RUN: route, do not route (use the best single teacher), or cannot tell.

    The router's gain over the best single teacher is estimated on all calibration prompts, each scored
    by a router fitted without it, with a 95% interval. 'route' needs a gain over every single teacher
    beyond noise; it is wrong at most 5% of the time. Groups of prompts show where the gain comes from, and
    whether the same teacher leads everywhere, where routing gains nothing. Default groups: the first
    field of the run's [router] features, or the source where there are several.
    """
    with store() as database, database.read() as session:
        found = verdicts.facts(session, find_run(session, run), by=by)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    assert found.verdict is not None
    say_verdict(found)
    _rewards(found.verdict)
    _groups(found.verdict)
    rows = [(f"{at.alpha:g}", at.teacher, between(at.lead), at.second) for at in found.verdict.alphas]
    click.echo()
    show(("alpha", "best teacher", "lead", "over"), rows, as_json=False)


def _rewards(found: Verdict) -> None:
    rows = [
        ("router", f"{found.router:.3f}", between(found.gain), _share(found)),
        (found.teacher, f"{found.single:.3f}", "-", "-"),
        (found.second, f"{found.single - found.lead.mean:.3f}", f"{-found.lead.mean:+.3f}", "-"),
        ("oracle", f"{found.oracle:.3f}", f"{found.oracle - found.single:+.3f}", "+100%"),
    ]
    if found.by_group:
        rows.insert(1, ("best teacher per group", "-", between(found.by_group), "-"))
    click.echo()
    show(("choice", "reward", "over the best teacher", "closed"), rows, as_json=False)


def _share(found: Verdict) -> str:
    return between(found.gap_closed, "{:+.0%}") if found.gap_closed else "-"


def _groups(found: Verdict) -> None:
    if not found.groups:
        return
    click.echo()
    rows = [(g.group, g.n_prompts, g.teacher, between(g.lead), between(g.gain), f"{g.part:+.3f}") for g in found.groups]
    head = ("group", "prompts", "best teacher", f"lead over {found.teacher}", "router's gain", "part")
    show(head, rows, as_json=False)
    one = "one teacher leads in every group" if found.one_leads else "the best teacher differs between groups"
    click.echo(f"{one}; parts add up to the router's gain")


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
