"""The contract of a stage: one record with everything that others need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select
from sqlalchemy.orm import Session

from persyn.db.catalog import Run
from persyn.jobs.queue import Claim, ModelJobs
from persyn.llm.protocols import ModelSpec
from persyn.stages.batch import Batch, Done, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of a run that is worked as jobs; an engine computes between `load` and `save`."""

    name: str
    #: How figures draw it: colour and line.
    style: tuple[str, str]
    #: Create jobs for whatever is missing and return their number; 0 means that the stage is complete.
    plan: Callable[[Session, Run], int]
    #: Read what a job needs, so that no transaction is open while a model computes.
    load: Callable[[Session, Claim], Batch]
    #: The model that these jobs load, as the run's configuration has it now.
    spec: Callable[[Session, Run, ModelJobs], ModelSpec]
    #: Store some of a job's results; storing them twice leaves one row each.
    save: Callable[[Session, Claim, Sequence[Done]], None]
    #: Count the rows that the stage should produce: total = done + failed + pending.
    progress: Callable[[Session, Run], Progress]
    #: Count the rows that the stage should produce independently of `progress`, for the audit.
    expected: Callable[[Session, Run], int]
    #: Create the jobs that the results of a completed job make possible, before the stage's other jobs have ended.
    follow: Callable[[Session, Run, Claim], None] | None = None
    #: Select the failure of each failed row; None if rows cannot fail.
    failures: Callable[[Run], Select[Any]] | None = None
    #: How often planning finds something to do in a run without failures; each round waits for the results of the last.
    rounds: Callable[[Run], int] = lambda run: 1
    #: Whether each result that is saved is one of the rows that `progress` counts.
    counts_results: Callable[[Run], bool] = lambda run: True
    #: Delete rows that failed for these reasons, so that they are computed again; return their number.
    forget: Callable[[Session, Run, Collection[str]], int] | None = None
