"""`persyn sql`: run a query or a saved query against the store."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from persyn.cli.context import JSON, cell, show, store
from persyn.errors import UsageError
from persyn.sql import ask, saved
from persyn.sql.ask import Limits


@click.command()
@click.argument("query", required=False)
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the query from a file."
)
@click.option("--ask", "name", metavar="NAME", help="Run a saved query; --list shows them.")
@click.option(
    "-p", "given", multiple=True, metavar="NAME=VALUE", help="A value for :NAME in the query; may be repeated."
)
@click.option("--list", "is_list", is_flag=True, help="Show the saved queries.")
@click.option("--limit", default=Limits().rows, show_default=True, type=click.IntRange(1), help="Maximum rows.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(0.1), help="Time limit in seconds.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")
@JSON
def sql(*, is_list: bool, limit: int, seconds: float, as_csv: bool, as_json: bool, **asked: Any) -> None:
    """Run a QUERY, one SELECT, on the store; "-" reads it from standard input. It cannot change anything.

    \b
    persyn sql "select finish_reason, count(*) from responses group by 1"
    persyn sql --ask progress -p run=first
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json are mutually exclusive; give one")
    if is_list:
        _show(["name", "parameters", "question"], _listed(), as_csv=as_csv, as_json=as_json)
        return
    statement, parameters = _statement(**asked)
    with store() as database:
        if asked["name"] is not None:
            with database.read() as session:
                saved.require_there(session, parameters)
        answer = ask.ask(database, statement, parameters, Limits(rows=limit, seconds=seconds, megabytes=256))
    _show(answer.columns, answer.rows, as_csv=as_csv, as_json=as_json)
    if not answer.rows and not as_csv and not as_json:
        click.echo("(no rows)", err=True)
    if answer.is_truncated:
        click.echo(f"(the first {len(answer.rows)} rows; more with --limit)", err=True)


def _listed() -> list[tuple[str, str, str]]:
    return [
        (each.name, " ".join(f"-p {name}=" for name in each.parameters), each.title)
        for each in saved.queries().values()
    ]


def _statement(
    query: str | None, file: Path | None, name: str | None, given: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """The statement to run, and the values of its parameters."""
    if sum(each is not None for each in (query, file, name)) != 1:
        raise UsageError("give one of: a query, --file, --ask NAME (see --list)")
    parameters = dict(_parameter(each) for each in given)
    if len(parameters) < len(given):
        raise UsageError(f"-p was given twice for one name: {', '.join(given)}")
    if name is not None:
        question = saved.find(name)
        if lacking := [each for each in question.parameters if each not in parameters]:
            needs = " ".join(f"-p {each}=..." for each in lacking)
            raise UsageError(f"the saved query {name!r} needs {needs}")
        if unknown := [each for each in parameters if each not in question.parameters]:
            takes = " ".join(f"-p {each}=" for each in question.parameters) or "no parameters"
            raise UsageError(f"the saved query {name!r} has no parameter {', '.join(unknown)}; it takes {takes}")
        return question.sql, parameters
    text = _text(file) if file is not None else sys.stdin.read() if query == "-" else query or ""
    if unused := [each for each in parameters if not re.search(rf":{re.escape(each)}\b", text)]:
        raise UsageError(f"the query has no parameter :{', :'.join(unused)}")
    return text, parameters


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error


def _parameter(given: str) -> tuple[str, str]:
    name, is_there, value = given.partition("=")
    if not is_there or not name:
        raise UsageError(f"-p takes NAME=VALUE, got {given!r}")
    return name, value


def _show(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, as_csv: bool, as_json: bool) -> None:
    if as_csv:
        ask.write_csv(sys.stdout, columns, rows)
    elif as_json or _fits(columns, rows):
        show(columns, rows, as_json=as_json)
    else:
        _show_upright(columns, rows)


def _fits(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
    """Whether a table of these rows fits the terminal's width, folding long texts."""
    most_folded = 40
    widths = [
        max(len(column), *(min(len(cell(row[n])), most_folded) for row in rows), 0) for n, column in enumerate(columns)
    ]
    return sum(widths) + 2 * len(widths) <= shutil.get_terminal_size().columns


def _show_upright(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print one line per column for each row."""
    width = max(map(len, columns))
    for number, row in enumerate(rows, 1):
        click.secho(f"-- row {number}", dim=True)
        for column, value in zip(columns, row, strict=True):
            click.echo(f"{column:<{width}}  {cell(value)}")
