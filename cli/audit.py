"""`persyn audit`: check the consistency of a run in the store."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click
import msgspec

from persyn.analysis import audit as rules
from persyn.analysis import watch
from persyn.analysis.audit import Violation
from persyn.cli.context import JSON, RUN, find_run, plain, store


@click.command()
@RUN
@JSON
def audit(run: str, as_json: bool) -> None:
    """Check counts, responses and the history of every job of RUN; exit 1 when something is wrong.

    Prints each finding on a line as it is found, then the share of rows that failed, with the reasons: failed rows are
    not findings. Can be used while the run is running.
    """
    with store() as database, database.read() as session:
        audited = find_run(session, run)
        findings = rules.audit(session, audited)
        found = _as_json(findings) if as_json else _as_lines(findings)
        for shortfall in watch.shortfalls(watch.count_rows(session, audited)):
            click.echo(plain(str(shortfall)), err=as_json)
    click.echo(f"run {run}: {found} findings" if found else f"run {run} is consistent", err=as_json or bool(found))
    if found:
        sys.exit(1)


def _as_lines(findings: Iterator[Violation]) -> int:
    count = 0
    for finding in findings:
        click.echo(f"{finding.rule}: {finding.about}: {finding.found}")
        count += 1
    return count


def _as_json(findings: Iterator[Violation]) -> int:
    every = list(findings)
    click.echo(msgspec.json.encode(every).decode())
    return len(every)
