"""The trace of a response leads back to its GPU and forward to its uses."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from persyn.analysis import trace
from persyn.analysis.trace import Trace
from persyn.db.catalog import Run, Scorer
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.errors import UsageError
from tests.factories import digest
from tests.sql import by_hand
from tests.sql.by_hand import NOON


@pytest.fixture
def known(database: Database) -> Database:
    with database.write() as session:
        by_hand.fill(session)
    return database


def traced(database: Database, prompt_id: int) -> Trace:
    with database.read() as session:
        return trace.trace(session, session.scalars(select(Run).where(Run.name == "first")).one(), prompt_id)


def test_a_calibration_response_is_traced_back_to_model_scores_reward_worker_and_gpu(known: Database) -> None:
    found = traced(known, 1)
    ada, bob = found.responses
    wanted = {
        "teacher": "ada",
        "response_id": 1,
        "tokens": 20,
        "seed": 7,
        "revision": "abc",
        "template_hash": "t",
        "job_id": 1,
        "asked_by_run": "first",
        "worker": "w1",
        "gpus": "0 H100",
        "engine_log": "1.log",
        "quality": 1.0,
        "learnability": -1.0,
        "reward": 0.6,
    }
    assert {name: ada[name] for name in wanted} == wanted
    assert (bob["quality"], bob["learnability"], bob["reward"]) == (0.0, -0.5, 0.4)
    assert (found.source, found.teacher, found.assignment["reason"]) == ("prompts.jsonl", "ada", "calibration")
    assert [(row["teacher"], row["scorer"], row["value"], row["n_tokens"]) for row in found.scores] == [
        ("ada", "fake", 1.0, None),
        ("ada", "log_likelihood", -20.0, 20),
        ("bob", "fake", 0.0, None),
        ("bob", "log_likelihood", -20.0, 40),
    ]
    with known.read() as session:
        fingerprints = set(session.scalars(select(Scorer.fingerprint)))
    assert {row["scorer_fingerprint"] for row in found.scores} == fingerprints


def test_a_response_is_of_the_worker_that_held_its_job_then(known: Database) -> None:
    """Job 2 belonged to w1 until w2 took it over in the second second."""
    with known.write() as session:
        session.get_one(Response, 2).created_at = NOON + timedelta(seconds=1.5)
    assert [(row["worker"], row["engine_log"]) for row in traced(known, 1).responses if row["teacher"] == "bob"] == [
        ("w1", "2.log")
    ]
    assert [(row["worker"], row["engine_log"]) for row in traced(known, 3).responses if row["teacher"] == "bob"] == [
        ("w2", "3.log")
    ]


def test_a_target_is_traced_back_to_the_router(known: Database) -> None:
    found = traced(known, 4)
    assert (found.role, found.teacher, found.assignment["margin"]) == ("target", "ada", 2.0)
    assert (found.router["fingerprint"], found.router["sha256"]) == (digest("router"), digest("files"))
    assert found.router_scores == [{"teacher": "ada", "score": 1.5}, {"teacher": "bob", "score": -0.5}]
    (response,) = found.responses
    assert (response["quality"], response["learnability"], response["reward"]) == (None, None, None)


def test_a_prompt_is_traced_forward_to_the_runs_and_students_that_have_it(known: Database) -> None:
    student = {"training_id": 1, "student": "students/first"}
    nobody = {"training_id": None, "student": None}
    first = {"run": "first", "role": "calibration", "teacher": "ada", "is_answered": True}
    second = {"run": "second", "role": "target", "teacher": "ada", "is_answered": True}
    assert traced(known, 1).uses == [first | student, second | nobody]
    # Prompt 6 has no response that a student could have been trained on.
    (unanswered,) = traced(known, 6).uses
    assert unanswered == {"run": "first", "role": "target", "teacher": "bob", "is_answered": False} | nobody


def test_a_prompt_of_another_run_is_refused(known: Database) -> None:
    with pytest.raises(UsageError, match="has no prompt 999"):
        traced(known, 999)
