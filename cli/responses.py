"""`persyn responses`: import responses generated elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from persyn.cli.context import store
from persyn.cli.imports import NAMES, ON_ERROR, renamed, show_report
from persyn.cli.progress import counting_rows
from persyn.errors import UsageError
from persyn.ingest import responses as cells
from persyn.ingest import versions
from persyn.ingest.response_rows import FIELDS, Layout
from persyn.runs import run_file


@click.group()
def responses() -> None:
    """Import existing responses."""


@responses.command("import", short_help="Import responses from files.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--teachers",
    type=click.Path(path_type=Path),
    help="A TOML or JSON file with [[teachers]] (family, params_b, prices, ...), such as a run file.",
)
@NAMES
@click.option(
    "--prompt-field", multiple=True, metavar="NAME", help="A field that describes the prompt, stored with it."
)
@click.option(
    "--score", multiple=True, metavar="NAME", help="A field that is a score of the response, stored as a score."
)
@click.option(
    "--scores-only",
    is_flag=True,
    help="The rows have no response, only scores of it. A run that uses them needs alpha = 0 and exports no such row.",
)
@ON_ERROR
def import_responses(
    files: tuple[Path, ...],
    teachers: Path | None,
    names: tuple[str, ...],
    on_error: Literal["stop", "skip"],
    **fields: Any,
) -> None:
    """Import FILES of responses: JSONL, JSON or CSV (also .gz), or Parquet.

    A row has `prompt` or `messages`, `teacher` (or `model`) and `response` (or `output`; or turns that
    end with it), and may have `answer` (or `reference_answer`), `id`, `finish_reason`, `prompt_tokens` and
    `response_tokens`; all other fields are stored with the response. The grid may have gaps. A run
    that uses these teachers, with engine = "imported" unless --teachers gives another, scores,
    routes and exports their responses as if they had been generated here.

    \b
    persyn responses import grid.jsonl.gz --score correct
    persyn responses import scores.jsonl --score correct --scores-only
    persyn responses import grid.csv --map teacher=llm --map response=text --prompt-field topic
    """
    layout = Layout(renamed(names, FIELDS), fields["prompt_field"], fields["score"], fields["scores_only"])
    if layout.scores_only and not layout.score:
        raise UsageError("--scores-only needs --score NAME, the field that has the score")
    tables = run_file.read_teachers(teachers) if teachers else []
    known = versions.identities(tables)
    with store() as database, counting_rows() as count, database.write() as session:
        ids = {table.name: versions.teacher(session, table, known) for table in tables} if teachers else None
        report = cells.import_responses(session, files, layout=layout, teachers=ids, on_error=on_error, progress=count)
    show_report(report, what="text or answer")
