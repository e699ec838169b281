"""The prompts of a run that have no assignment yet, and who can answer them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, exists, func, select, union
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, load_config
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.results import Assignment, Fallback, Response, RouterScore
from persyn.method.intervals import Vector
from persyn.method.limits import Counts
from persyn.method.rewards import Matrix
from persyn.stages.batch import CHARACTERS


def missing(run_id: int) -> Select[Any]:
    """The run's prompts without an assignment."""
    assigned = and_(Assignment.run_id == run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    return (
        select(RunPrompt.prompt_id)
        .outerjoin(Assignment, assigned)
        .where(RunPrompt.run_id == run_id, Assignment.prompt_id.is_(None))
    )


def unscored(run: Run) -> Select[Any]:
    """Those without scores of the run's router."""
    scored = and_(RouterScore.router_id == run.router_id, RouterScore.prompt_id == RunPrompt.prompt_id)
    return missing(run.id).where(~exists().where(scored))


def present(session: Session, teacher_ids: Sequence[int], prompt_ids: Sequence[int]) -> NDArray[np.bool_]:
    """Which teachers can answer which prompts, as (P, T) booleans.

    An imported teacher can answer only where a response text of it was imported. A prompt that no teacher can answer
    counts as answerable by all: it is assigned, and its response will be missing.
    """
    of_teacher = Teacher.id.in_(teacher_ids), Teacher.engine == IMPORTED
    imported = set(session.scalars(select(Teacher.id).where(*of_teacher)))
    can_be_asked = np.array([teacher_id not in imported for teacher_id in teacher_ids], dtype=np.bool_)
    present = np.tile(can_be_asked, (len(prompt_ids), 1))
    if imported:
        texts = _texts(session, imported, prompt_ids)
        for row, prompt_id in enumerate(prompt_ids):
            for column, teacher_id in enumerate(teacher_ids):
                present[row, column] |= (prompt_id, teacher_id) in texts
        present[~present.any(axis=1)] = True
    return present


def _texts(session: Session, teacher_ids: Collection[int], prompt_ids: Sequence[int]) -> set[tuple[int, int]]:
    found = session.execute(
        select(Response.prompt_id, Response.teacher_id).where(
            Response.teacher_id.in_(teacher_ids),
            Response.prompt_id.in_(prompt_ids),
            Response.sample == 0,
            Response.text.is_not(None),
        )
    )
    return {(prompt_id, teacher_id) for prompt_id, teacher_id in found}


def further(run: Run, teacher_ids: Sequence[int], values: Matrix, winners: Sequence[int]) -> list[list[int] | None]:
    """The teachers that are next after each prompt's, best first; None in a run without [fallback].

    values:  (P, T) by which the teachers are chosen; NaN where one cannot be.
    winners: (P,) columns of the chosen teachers.
    """
    if load_config(run.config).fallback is None:
        return [None] * len(winners)
    falling = np.argsort(-values, axis=1, kind="stable").tolist()  # NaN sorts last
    known = (~np.isnan(values)).tolist()
    return [
        [teacher_ids[column] for column in order if is_known[column] and column != winner]
        for order, is_known, winner in zip(falling, known, winners, strict=True)
    ]


def given(session: Session, run: Run, teachers: Sequence[Teacher], *, first: int = 1) -> tuple[Counts, Vector]:
    """(T,) the number and the characters of the target prompts that each teacher was given, also those that it left.

    first: 2 for those alone that [fallback] gave it.
    """
    choices = union(
        *(
            select(of.prompt_id, of.teacher_id).where(of.run_id == run.id, of.choice >= first)
            for of in (Assignment, Fallback)
        )
    ).subquery()
    found = session.execute(
        select(choices.c.teacher_id, func.count(), func.sum(CHARACTERS))
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == choices.c.prompt_id))
        .join(Prompt, Prompt.id == choices.c.prompt_id)
        .where(RunPrompt.role == Role.TARGET)
        .group_by(choices.c.teacher_id)
    )
    of_teacher = {teacher_id: (count, float(characters)) for teacher_id, count, characters in found}
    counts, characters = np.array([of_teacher.get(teacher.id, (0, 0.0)) for teacher in teachers]).T
    return counts.astype(np.int64), characters


def first_sample(run: Run) -> int | None:
    """The sample that a new assignment keeps; None where it will be chosen."""
    return None if load_config(run.config).generation.is_choice else 0


def first_answered(session: Session, run: Run, between: tuple[int, int]) -> dict[tuple[int, int], int]:
    """{(prompt, teacher): the first sample with a text} of the grid's prompts from the first to the last of two ids."""
    key = Response.prompt_id, Response.teacher_id
    found = session.execute(
        select(*key, func.min(Response.sample))
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == Response.prompt_id))
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .where(RunPrompt.role != Role.TARGET, RunPrompt.prompt_id.between(*between))
        .where(Response.sample < load_config(run.config).run.samples)
        .where(Response.text.is_not(None))
        .group_by(*key)
    )
    return {(prompt_id, teacher_id): sample for prompt_id, teacher_id, sample in found}
