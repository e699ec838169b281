"""What every import says to a person: what a bad row does, and what came of it all."""

from __future__ import annotations

import click

from persyn.stages.imports import ImportReport

ON_ERROR = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What a bad row does: stop, with nothing imported, or be skipped and reported.",
)


def show_report(report: ImportReport, *, what: str) -> None:
    """Print the counts, and the first bad rows.

    what: that differed in a row that conflicts with a stored one.
    """
    replaced = f"{report.replaced:,} in place of failed ones, " if report.replaced else ""
    scores = f"; {report.new_scores:,} new scores" if report.new_scores else ""
    click.echo(
        f"{report.rows:,} rows: {report.new:,} new, {replaced}{report.duplicates:,} already there, {report.bad:,} bad"
        + scores
    )
    if report.conflicts:
        click.echo(f"{report.conflicts:,} rows came with another {what} than the stored one, which stays", err=True)
    for bad in report.first_bad:
        click.echo(f"  {bad}", err=True)
