"""The saved queries give correct answers, the same on both databases."""

from __future__ import annotations

from typing import Any

import pytest

from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.sql import ask, child, saved
from persyn.sql.ask import Limits
from tests.factories import digest
from tests.sql import by_hand

Rows = list[tuple[Any, ...]]

#: For run first, prompt 1 and job 2 of the store in `by_hand`.
ANSWERS: dict[str, Rows] = {
    "progress": [
        ("calibrate", 6, 5, 1, 0),
        # 5 texts, 2 scorers; the quality of ada's second is missing.
        ("score", 10, 8, 1, 1),
        ("fit_router", 1, 1, 0, 0),
        ("assign", 6, 6, 0, 0),
        ("generate", 6, 4, 1, 1),
    ],
    "jobs": [
        ("calibrate", "done", 2, 6, 90.0),
        ("generate", "done", 1, 1, 10.0),
        ("generate", "running", 1, 2, None),
    ],
    "holders": [("w2", "first", "generate", "bob", None, 4, 2, "2026-01-02 12:00:00.000000")],
    "retried": [(2, "calibrate", "bob", None, "done", 2, 0, "the engine ended")],
    "failures": [
        ("calibrate", "bob", None, "too_long", 1, "too_long: 900 tokens"),
        ("score", "ada", "log_likelihood", "not_finite", 1, "not_finite: the score is nan"),
        ("generate", "bob", None, "empty", 1, "empty"),
    ],
    "missing": [("score", "ada", "fake", 1, 2), ("generate", "bob", None, 1, 6)],
    "loads": [("vllm.bob", None, 2, 2, 12.0, 7.0), ("vllm.ada", "0 H100", 1, 1, 4.0, 4.0)],
    # ada: 4 responses of 10 + (20, 10, 30, 50) tokens: 40 x 1 + 110 x 2 millionths of a dollar.
    # bob: 2 responses of 10 + (40, 20): 20 x 3 + 60 x 6.
    "cost": [("ada", 4, 4, 0, 40, 110, 0.00026), ("bob", 2, 2, 2, 20, 60, 0.00042)],
    # ada reasons in two of four responses, with 12 and 20 of its 110 tokens.
    "reasoning": [("ada", 4, 2, 0, 16.0, 32 / 110), ("bob", 2, 0, 0, None, 0.0)],
    # On the grid ada writes 20 and bob 30 tokens on average; for 6 prompts that is 120 and 180, which cost 60 x 1 + 120
    # x 2 and 60 x 3 + 180 x 6 millionths.
    "savings": [(170, 300.0, 170 / 300, 0.00068, 0.00156)],
    # ada won prompt 1 by 0.2 and prompt 3 by 1.
    "shares": [("ada", "calibration", 3, 0.6), ("bob", "router", 2, 1.1), ("ada", "router", 1, 2.0)],
    "dataset": [
        (1, "prompts.jsonl", None, "ada", "calibration", 0.2, "stop", 20, "first: prompt 0?", "Answer to 1."),
        (2, "prompts.jsonl", None, "ada", "calibration", None, "stop", 10, "first: prompt 1?", "Answer to 2."),
        (3, "prompts.jsonl", None, "ada", "calibration", 1.0, "stop", 30, "first: prompt 2?", "Answer to 3."),
        (4, "prompts.jsonl", None, "ada", "router", 2.0, "length", 50, "first: prompt 3?", "Answer to 4."),
    ],
    "uses": [
        ("first", "calibration", "ada", "calibration", 1, 1, "2026-01-02 12:00:00.000000"),
        ("second", "target", "ada", "strong", 1, None, None),
    ],
    "history": [
        ("2026-01-02 12:00:00.000000", "w1", 1, "queued", "running", "{}"),
        ("2026-01-02 12:00:01.000000", "dispatch", 1, "running", "queued", "{}"),
        ("2026-01-02 12:00:02.000000", "w2", 2, "queued", "running", "{}"),
        ("2026-01-02 12:00:03.000000", "w2", 2, "running", "done", "{}"),
    ],
    "truncated": [("ada", 4, 1, 50)],
    "sources": [
        ("prompts.jsonl", "calibration", 2, 0),
        ("prompts.jsonl", "holdout", 1, 0),
        ("prompts.jsonl", "target", 3, 0),
    ],
    # ada's rewards are 0.6 and 1, bob's 0.4 and 0; prompt 2 has none. ada's learnability is -1 and -1, bob's -0.5 and
    # -2.
    "grid": [("ada", 3, 0.875, -1.0, 0.8, 2), ("bob", 3, 0.125, -1.25, 0.2, 0)],
    "why": [
        ("ada", None, None, 1.0, -1.0, 1, "calibration", 0.2),
        ("bob", None, None, 0.0, -0.5, 0, None, None),
    ],
    "close-calls": [
        (5, "bob", 0.2, "first: prompt 4?"),
        (4, "ada", 2.0, "first: prompt 3?"),
        (6, "bob", 2.0, "first: prompt 5?"),
    ],
    # The router ranks bob first on the hold-out prompt, where ada's reward is higher; two teachers have no Hit@3.
    "hits": [(1, 0.0, None)],
    # -12 nats over 6 tokens.
    "students": [
        ("student", None, None, "test.jsonl", "fake", 2, 2, 0, 0.5),
        ("student", "first", 1, "test.jsonl", "fake", 2, 2, 0, 1.0),
        ("student", "first", 1, "test.jsonl", "log_likelihood", 2, 1, 1, -2.0),
    ],
}


@pytest.fixture
def known(database: Database) -> Database:
    with database.write() as session:
        by_hand.fill(session)
    return database


def test_each_question_of_the_book_has_its_answer(known: Database) -> None:
    for name, expected in ANSWERS.items():
        assert answered(known, name) == [pytest.approx(row) for row in expected], name


def test_a_row_of_a_dataset_is_traced_to_its_model_router_job_and_worker(known: Database) -> None:
    ((*found, written_at),) = answered(known, "origin")
    assert found == [
        *("ada", "ada", "abc", "t", "calibration", 0.6, 0.2, "fake 1", 7),
        *(digest("router"), "backbone", 1, 1, "first", "w1"),
    ]
    assert written_at is not None


def test_the_book_has_no_question_without_an_answer_here() -> None:
    assert set(saved.queries()) == {*ANSWERS, "origin"}


def test_a_question_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'progress'"):
        saved.find("progess")


def answered(store: Database, name: str) -> Rows:
    question = saved.find(name)
    values = {"run": "first", "prompt": "1", "job": "2"}
    parameters: dict[str, Any] = {each: values[each] for each in question.parameters}
    # In this process; one process per query would take longer than all of them.
    found = child.answer(ask.requested(store, question.sql, parameters, Limits()))
    assert isinstance(found, child.QueryResult), found
    return found.rows
