"""Select example responses for a report, each beside the best response of another teacher."""

from __future__ import annotations

import numpy as np
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from persyn.analysis import summary, trace
from persyn.db.catalog import Role, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.grid import Grid
from persyn.db.results import Assignment, Response, answers_assignment
from persyn.method.rewards import Matrix
from persyn.report.facts import ExampleFacts, Shown

#: Number of examples from the grid, one per teacher, and of examples without other responses.
_EXAMPLES, _ALONE = 6, 3
_TEXT = 4_000


def draw(session: Session, run: Run, cells: Grid, rewarded: Matrix, facts: summary.Summary) -> list[ExampleFacts]:
    """For each of the teachers with the most prompts, select an example from the grid and one from other prompts."""
    ordered = sorted((t for t in facts.teachers if t.assigned), key=lambda teacher: -teacher.assigned)
    names = [teacher.teacher for teacher in ordered]
    wanted = [_first(session, run, name, in_grid=True) for name in names[:_EXAMPLES]]
    wanted += [_first(session, run, name, in_grid=False) for name in names[:_ALONE]]
    row_of = {prompt_id: row for row, prompt_id in enumerate(cells.prompt_ids.tolist())}
    by_name = [teacher.teacher for teacher in facts.teachers]
    found = []
    for prompt_id in wanted:
        if prompt_id is None:
            continue
        row = row_of.get(prompt_id)
        known = {} if row is None else dict(zip(by_name, rewarded[row].tolist(), strict=True))
        example = _example(trace.trace(session, run, prompt_id), known)
        found += [example] if example else []
    return found


def _first(session: Session, run: Run, teacher: str, *, in_grid: bool) -> int | None:
    """A prompt assigned to a teacher that it answered; from the grid, the one with the largest margin."""
    written = and_(answers_assignment(), Response.text.is_not(None))
    role = RunPrompt.role != Role.TARGET if in_grid else RunPrompt.role == Role.TARGET
    return session.scalars(
        select(Assignment.prompt_id)
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == Assignment.prompt_id))
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Assignment.teacher_id))
        .join(Teacher, Teacher.id == Assignment.teacher_id)
        .join(Response, written)
        .where(Assignment.run_id == run.id, Teacher.name == teacher, role)
        .order_by(*([func.coalesce(Assignment.margin, 0).desc()] if in_grid else []), Assignment.prompt_id)
        .limit(1)
    ).first()


def _example(found: trace.Trace, rewards_of: dict[str, float]) -> ExampleFacts | None:
    responses = {row["teacher"]: row for row in reversed(found.responses)}
    if found.teacher not in responses:
        return None
    others = sorted(
        (name for name, reward in rewards_of.items() if name != found.teacher and not np.isnan(reward)),
        key=lambda name: -rewards_of[name],
    )
    return ExampleFacts(
        prompt_id=found.prompt_id,
        role=str(found.role),
        reason=found.assignment["reason"],
        margin=found.assignment["margin"],
        text=trace.beginning(found.text, _TEXT),
        chosen=_shown(responses[found.teacher], rewards_of),
        best_other=_shown(responses[others[0]], rewards_of) if others else None,
    )


def _shown(row: trace.TraceRow, rewards_of: dict[str, float]) -> Shown:
    reward = rewards_of.get(row["teacher"])
    return Shown(
        teacher=row["teacher"],
        text=None if row["text"] is None else trace.beginning(row["text"], _TEXT),
        reasoning=None if row["reasoning"] is None else trace.beginning(row["reasoning"], _TEXT),
        failure=row["failure"],
        quality=row["quality"],
        learnability=row["learnability"],
        reward=None if reward is None or np.isnan(reward) else reward,
    )
