"""`persyn prompts`: import and list prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click
import msgspec
from sqlalchemy import func, select

from persyn.cli.context import ID, JSON, LIMIT, cell, plain, show, store
from persyn.cli.imports import NAMES, ON_ERROR, renamed, show_report
from persyn.cli.progress import counting_rows
from persyn.db.catalog import Prompt
from persyn.errors import UsageError, shorten
from persyn.ingest import prompt_import
from persyn.ingest.layouts import PROMPT
from persyn.llm.tools import written
from persyn.stages.batch import conversation

#: Characters of a prompt shown in a table.
_BEGINNING = 120


@click.group()
def prompts() -> None:
    """Import and list prompts."""


@prompts.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@NAMES
@ON_ERROR
def import_prompts(files: tuple[Path, ...], names: tuple[str, ...], on_error: Literal["stop", "skip"]) -> None:
    """Import FILES: JSONL, JSON or CSV (also .gz), or Parquet.

    A row has `prompt` (a text) or `messages` (turns, of which the last is the user's or a tool's), and may
    have `system`, `tools`, `response_schema`, `answer` and `id`; all other fields are stored as its metadata.
    ShareGPT's `conversations` and Alpaca's `instruction` and `input` are also read. A conversation that is
    already stored is counted and not stored again.

    \b
    persyn prompts import questions.csv --map prompt=question --map answer=gold
    """
    with store() as database, counting_rows() as count, database.write() as session:
        report = prompt_import.import_prompts(
            session, files, names=renamed(names, PROMPT), on_error=on_error, progress=count
        )
    show_report(report, what="answer")


@prompts.command("list")
@click.option("--limit", default=20, show_default=True, type=LIMIT, help="Maximum number of prompts.")
@click.option("--after", default=0, show_default=True, type=ID, help="Begin after this id.")
@JSON
def list_prompts(limit: int, after: int, as_json: bool) -> None:
    """List prompts by id. A table shows the beginning of each; 'show' and --json print the complete text."""
    with store() as database, database.read() as session:
        columns = (Prompt.id, Prompt.source, Prompt.source_id, Prompt.text, Prompt.answer)
        found = session.execute(select(*columns).where(Prompt.id > after).order_by(Prompt.id).limit(limit)).all()
    rows: list[tuple[Any, ...]] = [tuple(row) for row in found]
    if not as_json:
        rows = [(*ids, shorten(text, most=_BEGINNING), answer) for *ids, text, answer in rows]
    show([column.key for column in columns], rows, as_json=as_json)


@prompts.command("show")
@click.argument("prompt_id", metavar="PROMPT", type=ID)
@JSON
def show_prompt(prompt_id: int, as_json: bool) -> None:
    """Show the complete prompt with the id PROMPT."""
    with store() as database, database.read() as session:
        prompt = session.get(Prompt, prompt_id)
        if prompt is None:
            raise UsageError(f"there is no prompt {prompt_id}; 'persyn prompts list' lists them")
        turns = conversation(prompt)
        facts = {
            "tools": prompt.tools,
            "response_schema": prompt.response_schema,
            "answer": prompt.answer,
            "source": prompt.source,
            "source_id": prompt.source_id,
            "meta": prompt.meta,
        }
    if as_json:
        click.echo(msgspec.json.encode({"id": prompt_id, "messages": turns, **facts}).decode())
        return
    for turn in turns:
        click.echo(f"[{turn['role']}]\n{plain(written(turn))}\n")
    for name, value in facts.items():
        click.echo(f"{name}: {cell(value)}")


@prompts.command()
@JSON
def stats(as_json: bool) -> None:
    """Count the prompts by the file they came from."""
    with store() as database, database.read() as session:
        rows = session.execute(
            select(Prompt.source, func.count(), func.count(Prompt.answer), func.avg(func.length(Prompt.text)))
            .group_by(Prompt.source)
            .order_by(func.count().desc())
        ).all()
    show(
        ("source", "prompts", "with answer", "mean characters"),
        [(source, count, answers, float(mean)) for source, count, answers, mean in rows],
        as_json=as_json,
    )
