"""Add prompts to a run that is done or running; its router assigns them, without another calibration."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
from msgspec import Struct
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup, notes
from persyn.db.catalog import Run, RunPrompt, RunState
from persyn.db.connect import take_time
from persyn.errors import UsageError
from persyn.ingest import prompt_import, prompt_table
from persyn.ingest.imports import ImportReport
from persyn.ingest.prompt_import import PromptFiles
from persyn.llm import quality
from persyn.runs import pipeline, run_file, same_run, scheduling, start
from persyn.stages import limits, registry

#: Of the events' detail.
_KEY = "extended"


class Extension(Struct, frozen=True):
    """Prompts that were added to a run together, as an event records it."""

    #: From 1.
    number: int
    prompts: int
    #: Names of the files, and the hashes of their content.
    files: list[str]
    sha256: list[str]
    #: The share of the prompts that are far from the calibration prompts; None where it was not measured.
    far: float | None = None


def add(
    session: Session, run_id: int, files: PromptFiles, *, on_rows: Callable[[int], None] | None = None
) -> tuple[Extension, ImportReport]:
    """Add the prompts of files to a run as targets; `go_on` then continues it. Without new prompts nothing changes.

    on_rows: called from time to time with the number of rows read.
    Raises `UsageError` for a run that cannot be extended, for files as `prompt_import.import_prompts` does, and where
    the limits of [strategy] leave no room for the prompts; the caller must then roll the transaction back.
    """
    prompt_table.lock(session)  # before any other lock, in the same order as every import
    run = lookup.whole(session, run_id)
    require_extensible(run)
    last = select(func.max(RunPrompt.extension)).where(RunPrompt.run_id == run.id)
    number = (session.scalar(last) or 0) + 1
    report = prompt_import.extend_run(session, run.id, number, files, progress=on_rows)
    added = select(func.count()).where(RunPrompt.run_id == run.id, RunPrompt.extension == number)
    made = Extension(
        number,
        session.scalars(added).one(),
        [os.fsencode(path.name).decode(errors="replace") for path in files.paths],
        [same_run.sha256(path) for path in files.paths],
    )
    if made.prompts:
        take_time(session)
        start.require_schemas(session, run)
        limits.require(session, run)
        if registry.ASSIGN in registry.reached(run.stage):
            limits.require_room(session, run)
    return made, report


def go_on(session: Session, run_id: int, made: Extension, *, actor: str) -> None:
    """Continue a run that an extension has added prompts to, and record it."""
    run = lookup.whole(session, run_id)
    pipeline.go_back_to(session, run, registry.ASSIGN, actor=actor, detail={_KEY: msgspec.to_builtins(made)})


def of_run(session: Session, run: Run) -> list[Extension]:
    """The extensions of a run in order."""
    return msgspec.convert(notes.noted(session, run, _KEY), list[Extension])


def require_extensible(run: Run) -> None:
    """Raise `UsageError` for a run that takes no more prompts."""
    if run.state not in (RunState.DONE, RunState.RUNNING):
        how = scheduling.how_to_continue(run) if run.state is RunState.PAUSED else f"persyn run resume {run.name}"
        raise UsageError(
            f"run {run.name!r} is {run.state}, and only a run that is done or running is extended; first: {how}"
        )
    config = load_config(run.config)
    if run_file.n_calibration(config) is None:
        raise UsageError(
            f"run {run.name!r} uses strategy {config.strategy.name}, which has every teacher answer every prompt, so "
            "that no router could assign more; start a run under another name with all prompts, which generates no "
            "stored response again"
        )


def notices(session: Session, run: Run, made: Extension) -> list[str]:
    """What the user should know about the added prompts."""
    config = load_config(run.config)
    need = quality.need(config)
    if not (made.prompts and config.generation.is_scored and need):
        return []
    if not (count := prompt_import.unscorable(session, run.id, need, extension=made.number)):
        return []
    return [prompt_import.not_scored(count, need, config.generation)]
