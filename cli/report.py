"""`persyn report`: write the report of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from persyn.cli.context import RUN, find_run, store
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.settings import Settings

if TYPE_CHECKING:
    from persyn.analysis.refits import Curve
    from persyn.report.drawing import Picture
    from persyn.report.facts import Report


#: File extension -> format.
_FORMS = {"": "html", ".html": "html", ".htm": "html", ".md": "md", ".markdown": "md"}


@click.command()
@RUN
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file. Default: RUN-report.html, or .md.")
@click.option(
    "--format", "form", type=click.Choice(["html", "md"]), help="Default: by the file's extension, else html."
)
@click.option(
    "--figures", "folder", metavar="DIR", type=click.Path(path_type=Path), help="Also write each figure as SVG and PNG."
)
@click.option(
    "--group-by", metavar="FIELD", help="Metadata field to group by. Default: the first with few distinct values."
)
@click.option(
    "--curve", "with_curve", is_flag=True, help="Also compute the learning curve; needs the router's backbone."
)
def report(
    run: str, output: Path | None, form: str | None, folder: Path | None, group_by: str | None, with_curve: bool
) -> None:
    """Write a report of RUN: its configuration, the assignment of prompts to teachers, quality and provenance.

    The HTML report is a single file without scripts or network access. A run that is not done can be reported, too;
    the report lists what is missing. An earlier report, or folder of figures, is replaced; nothing else is.
    """
    from persyn.report import document, figures  # import matplotlib

    form = form or _form(output)
    output = output or Path(f"{run}-report.{form}")
    with store() as database:
        with database.read() as session:
            find_run(session, run)
        document.require_replaceable(output)
        if folder is not None:
            document.require_figures_folder(folder)
        found = _gather(database, run, group_by, _curve(database, run) if with_curve else None)
    pictures = figures.pictures(found)
    if folder is not None:
        document.write_figures(folder, pictures)
    document.write(output, _text(form, found, pictures, folder, output))
    click.echo(f"{output}: run {run}, {found.facts.state}, {len(pictures)} figures")


def _form(output: Path | None) -> str:
    """The format for a file name's extension; raise `UsageError` for an unknown extension."""
    ending = "" if output is None else output.suffix.lower()
    if ending not in _FORMS:
        raise UsageError(f"a report is HTML or Markdown, not {ending}; use .html or .md, or give --format")
    return _FORMS[ending]


def _gather(database: Database, run: str, group_by: str | None, curve: Curve | None) -> Report:
    from persyn.report import gather

    with database.read() as session:
        return gather.gather(session, find_run(session, run), group_by=group_by, curve=curve)


def _curve(database: Database, run: str) -> Curve:
    from persyn.analysis import refits  # imports torch

    with database.read() as session:
        grid = refits.read(session, find_run(session, run))
    return refits.curve(run, refits.freeze(grid, Settings.from_environment().home))


def _text(form: str, found: Report, pictures: list[Picture], folder: Path | None, output: Path) -> str:
    from persyn.report import document

    if form == "html":
        return document.html(found, pictures)
    place = None if folder is None else os.path.relpath(folder.resolve(), output.resolve().parent)
    return document.markdown(found, pictures, folder=place)
