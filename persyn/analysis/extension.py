"""Extend a run: compare the new prompts with its calibration prompts, add them, plan them, and continue the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from persyn.analysis import novelty, spending
from persyn.analysis import plan as planning
from persyn.analysis.novelty import Distance
from persyn.analysis.plan import Plan
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.ingest.imports import ImportReport
from persyn.ingest.prompt_import import PromptFiles
from persyn.jobs import owner
from persyn.runs import extension
from persyn.runs.extension import Extension


@dataclass(frozen=True, slots=True)
class Extended:
    """What became of new prompts.

    made:     has 0 prompts if all were in the run already, which then is as it was.
    distance: None where it could not be measured.
    """

    made: Extension
    report: ImportReport
    distance: Distance | None


@dataclass(frozen=True, slots=True)
class Teller:
    """What is called while an extension works.

    say:  with each notice for the user. rows: from time to time, with the number of prompt rows read.
    """

    say: Callable[[str], None]
    rows: Callable[[int], None] | None = None


def measure(database: Database, run_id: int, files: PromptFiles, home: Path, tell: Teller) -> Distance | None:
    """How far the new prompts of files are from a run's calibration prompts; see `novelty.read`."""
    with database.read() as session:
        run = session.get_one(Run, run_id)
        extension.require_extensible(run)
        question = novelty.read(session, run, files)
    return None if question is None else novelty.measure(question, home=home, say=tell.say)


def require_near(run: str, distance: Distance | None) -> None:
    """Raise `UsageError` if too many new prompts are far: the router would assign them by guessing."""
    if distance is None or not distance.is_much:
        return
    shown = ", ".join(repr(text) for text in distance.examples)
    raise UsageError(
        f"{distance}: the router of run {run!r} has seen none like them, such as {shown}. Nothing was added. Add them, "
        "and have all teachers answer N prompts, most of them new ones, so that the router learns from them: "
        f"--recalibrate N (or add them with --anyway, then: persyn run recalibrate {run} --prompts N; in Python "
        "anyway=True, then run.recalibrate(N))"
    )


def extend(database: Database, run_id: int, files: PromptFiles, distance: Distance | None, tell: Teller) -> Extended:
    """Add the prompts of files that are not in a run to it, in one transaction, and continue it.

    Raises `UsageError` as `extension.add` does; then nothing is changed.
    """
    with database.write() as session:
        made, report = extension.add(session, run_id, files, on_rows=tell.rows)
        made = structs.replace(made, far=None if distance is None else distance.share)
        for text in extension.notices(session, session.get_one(Run, run_id), made):
            tell.say(text)
        if made.prompts:
            spending.add_to_plan(session, session.get_one(Run, run_id), made.prompts)
            extension.go_on(session, run_id, made, actor=owner.actor())
    return Extended(made, report, distance)


def plan(database: Database, run_id: int, files: PromptFiles, tell: Teller) -> Plan:
    """The remaining work of a run with the prompts of files; nothing is stored. Raises `UsageError` like `extend`."""
    with database.write() as session:
        extension.add(session, run_id, files, on_rows=tell.rows)
        found = planning.of_run(session, session.get_one(Run, run_id))
        session.rollback()
    return found
