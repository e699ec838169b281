"""Options and output shared by all import commands."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import click

from persyn.errors import UsageError
from persyn.ingest.imports import ImportReport

ON_ERROR = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="How to handle a bad row: stop and import nothing, or skip and report it.",
)

NAMES = click.option(
    "--map",
    "names",
    multiple=True,
    metavar="FIELD=NAME",
    help="The file's name for FIELD; may be repeated.",
)


def renamed(names: Iterable[str], fields: Collection[str]) -> dict[str, str]:
    """Parse --map options to {our field: the file's field}; raise `UsageError` for an unknown field."""
    pairs: dict[str, str] = {}
    for given in names:
        ours, _, theirs = given.partition("=")
        if ours not in fields or not theirs:
            raise UsageError(f"--map takes FIELD=NAME, where FIELD is one of {', '.join(fields)}, got {given}")
        if ours in pairs:
            raise UsageError(f"--map gives the field {ours} twice: {pairs[ours]} and {theirs}")
        if theirs in pairs.values():
            raise UsageError(f"--map names the file's field {theirs} twice; it can be mapped to one field only")
        pairs[ours] = theirs
    return pairs


def show_report(report: ImportReport, *, what: str) -> None:
    """Print the counts and the first bad rows.

    what: the field that differed in rows that conflict with stored ones.
    """
    replaced = f"{report.replaced:,} in place of failed ones, " if report.replaced else ""
    scores = f"; {report.new_scores:,} new scores" if report.new_scores else ""
    click.echo(
        f"{report.rows:,} rows: {report.new:,} new, {replaced}{report.duplicates:,} already there, {report.bad:,} bad"
        + scores
    )
    if report.other_scores:
        click.echo(
            f"{report.other_scores:,} scores differ from the stored one of the same response, which is kept, or are of "
            "a response that is not stored; they were left out",
            err=True,
        )
    if report.missing_scores:
        click.echo(f"{report.missing_scores:,} values are missing in the fields with scores", err=True)
    if report.conflicts:
        click.echo(f"{report.conflicts:,} rows have a different {what} than the stored one, which is kept", err=True)
    for source, n_ids, source_id in report.repeated_ids:
        click.echo(
            f"ids of {source} that several prompts have: {n_ids:,}, such as {source_id!r}; every prompt was kept",
            err=True,
        )
    for bad in report.first_bad:
        click.echo(f"  {bad}", err=True)
