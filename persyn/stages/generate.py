"""Have each teacher answer the prompts assigned to it; where samples are chosen by quality, see `rejection`.

Responses that are not used send their prompts to other teachers, see `fallback`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import combined, lookup
from persyn.db.catalog import Run
from persyn.db.results import Assignment, Response
from persyn.jobs.queue import Claim
from persyn.stages import checking, drift, fallback, recalibrations, rejection
from persyn.stages.answers import Wanted
from persyn.stages.batch import Batch, Done
from persyn.stages.stage import Stage


def _wanted(run: Run) -> Select[Any]:
    """Select the responses that the run's dataset should have, present or missing."""
    return lookup.with_rows(select(Assignment.prompt_id).select_from(Assignment), run).where(
        Assignment.run_id == run.id
    )


def _missing(run: Run, teacher_id: int | None) -> Select[Any]:
    return _wanted(run).where(Assignment.teacher_id == teacher_id, Response.id.is_(None))


def _asked(run: Run, teacher_id: int | None) -> Select[Any]:
    """Those of `_missing` that the teacher is asked for: none, once it is stopped."""
    return _missing(run, teacher_id).where(~drift.is_stopped(run, teacher_id))


def _expected(session: Session, run: Run) -> int:
    return lookup.n_prompts(session, run.id) * load_config(run.config).generation.rows


def _of(run: Run) -> Stage:
    """The way of generating that a run asks for."""
    generation = load_config(run.config).generation
    if generation.is_choice:
        return _CHOICE
    return _CHECKED if generation.check else _PLAIN


def _plan(session: Session, run: Run) -> int:
    """Create jobs for what is missing; when nothing is, move prompts to their next teachers and look again."""
    recalibrations.conclude(session, run)
    combined.refresh(session, run)
    while not (made := _of(run).plan(session, run)):
        if not fallback.move(session, run):
            drift.require(session, run, _wanted(run))
            break
    return made


def _follow(session: Session, run: Run, job: Claim) -> None:
    if (follow := _of(run).follow) is not None:
        follow(session, run, job)


def _rounds(run: Run) -> int:
    table = load_config(run.config).fallback
    return _of(run).rounds(run) * (1 if table is None else 1 + table.attempts)


def _counts_results(run: Run) -> bool:
    return load_config(run.config).fallback is None and _of(run).counts_results(run)


def _of_job(session: Session, job: Claim) -> Stage:
    return _of(session.get_one(Run, job.run_id))


def _load(session: Session, job: Claim) -> Batch:
    return _of_job(session, job).load(session, job)


def _save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    _of_job(session, job).save(session, job, done)


def _failures(run: Run) -> Select[Any]:
    select_failures = _of(run).failures
    assert select_failures is not None
    return select_failures(run)


def _forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    delete = _of(run).forget
    assert delete is not None
    return delete(session, run, reasons)


_PLAIN = Wanted("generate", _wanted, _missing).stage(style=("red", "-"), expected=_expected)
_CHOICE = replace(
    _PLAIN,
    plan=rejection.plan,
    load=rejection.load,
    spec=rejection.spec,
    save=rejection.save,
    progress=rejection.progress,
    failures=rejection.failures,
    forget=rejection.forget,
    rounds=rejection.rounds,
    counts_results=lambda run: False,
)
_CHECKED = checking.checked(
    Wanted("generate", _wanted, _asked, is_spread=True).stage(style=("red", "-"), expected=_expected)
)
STAGE = replace(
    _PLAIN,
    plan=_plan,
    load=_load,
    spec=lambda session, run, of: _of(run).spec(session, run, of),
    save=_save,
    progress=lambda session, run: _of(run).progress(session, run),
    failures=_failures,
    forget=_forget,
    follow=_follow,
    rounds=_rounds,
    counts_results=_counts_results,
)
