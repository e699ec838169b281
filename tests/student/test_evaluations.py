"""Evaluations use the fields stored for their prompts, and store only finite numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import QualityTable
from persyn.db.catalog import Prompt, Run
from persyn.db.connect import Database
from persyn.db.trained import Evaluation, Outcome
from persyn.errors import UsageError
from persyn.ingest.rows import parse
from persyn.llm.protocols import Failed, Generate, Judge, Judged, Sampling
from persyn.student import evaluations, held_out
from tests.factories import MadeRun, digest, make_prompt, make_run, make_scorer

MATH, REWARD_MODEL = {"kind": "math"}, {"kind": "reward_model", "model": "lab/reward"}
INSTRUCTIONS, PYTHON = {"kind": "instructions"}, {"kind": "python", "model": "my:scorer"}
JUDGE = {"kind": "judge", "model": "judge", "options": {"engine": "fake"}}
AGAINST = {"kind": "judge", "model": "judge", "options": {"engine": "fake", "against": "answer"}}
LIKELIHOOD = None

FIRST: dict[str, Any] = {
    "prompt": "How much?",
    "answer": "7",
    "instruction_id_list": ["length_constraints:number_words"],
    "kwargs": [{"num_words": 5, "relation": "at least"}],
    "level": 1,
}
OTHER_ANSWER, OTHER_LEVEL = {"answer": "8"}, {"level": 2}
OTHER_KWARGS = {"kwargs": [{"num_words": 50, "relation": "at least"}]}


@pytest.fixture(autouse=True)
def run(database: Database) -> MadeRun:
    """A run with one prompt, which is not in the evaluation."""
    with database.write() as session:
        return make_run(session, prompts=1)


def asked(database: Database, folder: Path, table: dict[str, Any] | None, *rows: dict[str, Any]) -> int:
    """The number of prompts that would be evaluated from a file starting with `FIRST`, with this scorer."""
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (FIRST, *rows)))
    scorer = None if table is None else msgspec.convert(table, QualityTable)
    with database.write() as session:
        run = session.scalars(select(Run)).one()
        return len(held_out.prompts(session, run, [file], scorer, {})[0])


@pytest.mark.parametrize(
    ("table", "more", "said"),
    [
        (MATH, OTHER_ANSWER, "has answer '8', but '7' is stored with it"),
        (LIKELIHOOD, OTHER_ANSWER, "has answer '8', but '7' is stored with it"),
        (AGAINST, OTHER_ANSWER, "has answer '8', but '7' is stored with it"),
        (PYTHON, OTHER_ANSWER, "has answer '8', but '7' is stored with it"),
        (PYTHON, OTHER_LEVEL, "has level 2, but 1 is stored with it"),
        (INSTRUCTIONS, OTHER_KWARGS, "has kwargs [{'num_words': 50, 'relation': 'at least'}], but [{"),
    ],
)
def test_a_row_that_would_be_judged_by_something_else_than_it_says_is_refused(
    database: Database, tmp_path: Path, table: dict[str, Any] | None, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        asked(database, tmp_path, table, {"prompt": "Else?", "answer": "1"}, FIRST | more)
    assert str(refused.value).startswith(f"test.jsonl: the prompt 'How much?' {said}")


@pytest.mark.parametrize(
    ("table", "more"),
    [
        (REWARD_MODEL, OTHER_ANSWER | OTHER_LEVEL | OTHER_KWARGS),
        (JUDGE, OTHER_ANSWER | OTHER_LEVEL),
        (MATH, OTHER_LEVEL | OTHER_KWARGS),
        (INSTRUCTIONS, OTHER_ANSWER | OTHER_LEVEL),
        # A tabular file has nulls where others omit the field.
        (INSTRUCTIONS, {"kwargs": [{"num_words": 5, "relation": "at least", "language": None}]}),
        (PYTHON, {"answer": None, "level": None, "id": "q1"}),
    ],
)
def test_what_a_scorer_does_not_read_may_differ_and_what_a_row_does_not_say_is_taken_from_the_store(
    database: Database, tmp_path: Path, table: dict[str, Any], more: dict[str, Any]
) -> None:
    assert asked(database, tmp_path, table, FIRST | more) == 1


def test_a_prompt_of_the_run_is_not_asked_and_may_have_another_answer(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    with database.write() as session:
        prompt = session.get_one(Prompt, run.prompt_ids[0])
        prompt.content_hash, prompt.answer = parse(FIRST).content_hash, "8"

    assert asked(database, tmp_path, MATH, {"prompt": "Else?", "answer": "1"}) == 1


def make_evaluation(session: Session, run: MadeRun) -> Evaluation:
    evaluation = Evaluation(
        fingerprint=digest("evaluation"),
        student_id=session.get_one(Run, run.id).student_id,
        scorer_id=make_scorer(session, "reward_model"),
        name="test.jsonl",
        prompts_hash=digest("prompts"),
        how={},
    )
    session.add(evaluation)
    session.flush()
    return evaluation


@pytest.mark.parametrize(
    ("reason", "stored"),
    [
        ("empty: no text, finish reason stop", ("", None)),
        ("unfinished_reasoning: 64 tokens of reasoning and no answer, finish reason length", ("", None)),
        ("too_long: 9 tokens", (None, "too_long: 9 tokens")),
    ],
)
def test_a_prompt_that_the_student_leaves_without_an_answer_is_scored_and_a_refused_one_is_not(
    database: Database, run: MadeRun, reason: str, stored: tuple[str | None, str | None]
) -> None:
    with database.write() as session:
        evaluation = make_evaluation(session, run)
        outcome = Outcome(evaluation_id=evaluation.id, prompt_id=make_prompt(session, "asked?"))
        session.add(outcome)
        session.flush()
        request = evaluations._Asked(evaluation.id, outcome.prompt_id, Generate(0, [], Sampling(), seed=0))
        evaluations._store(session, request, Failed(0, reason))
        session.refresh(outcome)

        assert (outcome.response, outcome.failure) == stored


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_no_number_is_a_failure(database: Database, run: MadeRun, value: str) -> None:
    with database.write() as session:
        prompt_ids = [make_prompt(session, text) for text in ("asked?", "asked too?")]
        evaluation = make_evaluation(session, run)
        for prompt_id, judged in zip(prompt_ids, (float(value), 0.5), strict=True):
            session.add(Outcome(evaluation_id=evaluation.id, prompt_id=prompt_id, response="Yes."))
            session.flush()
            request = evaluations._Asked(evaluation.id, prompt_id, Judge(0, [], "Yes."))
            evaluations._store(session, request, Judged(0, judged, n_tokens=3))

    with database.read() as session:
        outcomes = session.scalars(select(Outcome).order_by(Outcome.prompt_id)).all()
    assert [(each.value, each.n_tokens, each.failure) for each in outcomes] == [
        (None, None, f"not_finite: the score is {value}"),
        (0.5, 3, None),
    ]
