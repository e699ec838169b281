"""What the limits of [strategy] leave to prompts that are added to an assigned run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sqlalchemy import select, update

from persyn.analysis import limits as words
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Fallback, RouterScore
from persyn.errors import UsageError
from persyn.method.limits import Limits, left
from persyn.stages import limits
from tests.factories import MadeRun
from tests.stages.test_limits import TARGETS, assigned, make, plan


def add(database: Database, made: MadeRun, n: int) -> None:
    """Add prompts on which every teacher is scored as right as the others."""
    with database.write() as session:
        run = session.get_one(Run, made.id)
        for place in range(n):
            prompt = Prompt(content_hash=f"{place:064x}", text=f"new {place}", source="more.jsonl", meta={})
            session.add(prompt)
            session.flush()
            session.add(RunPrompt(run_id=run.id, prompt_id=prompt.id, role=Role.TARGET, extension=1))
            for k, teacher_id in enumerate(made.teacher_ids):
                score = float(k == 0) * 4
                session.add(
                    RouterScore(router_id=run.router_id, prompt_id=prompt.id, teacher_id=teacher_id, score=score)
                )


def teachers(database: Database) -> Counter[str]:
    return Counter(teacher for _, teacher, _ in assigned(database))


def test_what_is_left_of_limits_is_all_less_what_is_used() -> None:
    whole = Limits(np.array([5, 0]), np.array([20, 8]), budget=10.0, cost_weight=0.5)

    found = left(whole, np.array([7, 3]), 12.0)

    assert (found.least.tolist(), found.most.tolist(), found.budget, found.cost_weight) == ([0, 0], [13, 5], 0.0, 0.5)


def test_a_capacity_is_for_all_prompts_of_the_run_together(database: Database) -> None:
    made = make(database, capacity={"a": 22})
    plan(database, made)
    assert teachers(database)["a"] == 21  # right on half of 40, and one more

    add(database, made, 10)  # a is the best for each
    plan(database, made)

    assert teachers(database)["a"] == 22
    assert teachers(database).total() == TARGETS + 10
    with database.read() as session:
        said = words.sentences(session, session.get_one(Run, made.id))
    assert said[0] == "the last 10 prompts were assigned within what 40 others left"


def test_prompts_that_a_second_choice_gave_to_a_teacher_take_its_room(database: Database) -> None:
    made = make(database, capacity={"a": 22})
    plan(database, made)
    with database.write() as session:  # one of b's 19 prompts went on to a, which has 22 now
        one = session.scalars(select(Assignment).where(Assignment.teacher_id == made.teacher_ids[1])).first()
        assert one is not None
        left = {"teacher_id": one.teacher_id, "choice": 1, "reason": one.reason, "cause": "failed"}
        session.add(Fallback(run_id=made.id, prompt_id=one.prompt_id, failure="refused: no", **left))
        one.teacher_id, one.choice = made.teacher_ids[0], 2

    add(database, made, 10)
    plan(database, made)

    assert teachers(database)["a"] == 22


def test_shares_are_of_all_prompts_of_the_run_together(database: Database) -> None:
    made = make(database, max_share={"a": 0.5})
    plan(database, made)

    add(database, made, 10)
    plan(database, made)

    assert teachers(database)["a"] == 25  # half of 50


def test_prompts_that_the_limits_leave_no_room_for_are_refused_before_they_are_routed(database: Database) -> None:
    made = make(database, capacity={"a": 20, "b": 15, "c": 10})
    plan(database, made)
    add(database, made, 6)  # 40 of 45 are used

    with (
        database.write() as session,
        pytest.raises(UsageError, match=r"room for 5 of 6 prompts\. To use others, start a run under another name"),
    ):
        limits.require_room(session, session.get_one(Run, made.id))


def test_a_budget_is_for_all_prompts_of_the_run_together(database: Database) -> None:
    made = make(database, budget=1.0)
    with database.write() as session:
        session.execute(update(Teacher).values(price_in=0.0, price_out=1000.0))  # a response of 2 tokens costs 0.002
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "strategy": {**run.config["strategy"], "budget": 0.09}}  # 45 responses
    plan(database, made)

    add(database, made, 6)

    with database.write() as session:
        run = session.get_one(Run, made.id)
        with pytest.raises(UsageError, match=r"the least possible cost is 0\.012 .*, and the budget 0\.01"):
            limits.require_room(session, run)
        last = session.scalars(select(RunPrompt).where(RunPrompt.extension == 1)).first()
        session.delete(last)
        session.flush()
        limits.require_room(session, run)  # five are left
