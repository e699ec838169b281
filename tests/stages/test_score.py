"""Scores that failed for want of a field are computed again once the prompt has it."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update

from persyn.db.catalog import Prompt, Run, Scorer
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.stages import score
from tests.factories import make_response, make_run

WELL_FORMED = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.mark.parametrize(
    ("kind", "failure", "mended", "not_mended"),
    [
        ("math", "no_reference_answer", {"answer": "4"}, {"answer": " "}),
        ("instructions", "no_instructions: none", {"meta": WELL_FORMED}, {"meta": {}}),
        ("code", "no_tests: none", {"meta": {"tests": ["assert f()"]}}, {"meta": {}}),
        ("instructions", "malformed_instructions: x", {"meta": WELL_FORMED}, {"meta": {**WELL_FORMED, "kwargs": []}}),
    ],
)
def test_what_failed_for_want_of_a_field_is_forgotten_once_the_field_is_there(
    database: Database, kind: str, failure: str, mended: dict[str, object], not_mended: dict[str, object]
) -> None:
    with database.write() as session:
        made = make_run(session, prompts=4, calibration=4)
        run = session.get_one(Run, made.id)
        session.execute(update(Scorer).where(Scorer.id == run.quality_scorer_id).values(kind=kind))
        failures = [failure, failure, "answer_error: too deep", None]
        for prompt_id, reason in zip(made.prompt_ids, failures, strict=True):
            response_id = make_response(session, prompt_id, made.teacher_ids[0])
            value = 1.0 if reason is None else None
            whose = {"response_id": response_id, "scorer_id": run.quality_scorer_id}
            session.add(Score(**whose, value=value, failure=reason, detail={}))
        session.flush()
        assert score.forget_mended(session, run) == 0

        first, *others = made.prompt_ids
        session.execute(update(Prompt).where(Prompt.id == first).values(**mended))
        session.execute(update(Prompt).where(Prompt.id.in_(others)).values(**not_mended))
        assert score.forget_mended(session, run, ["another_reason"]) == 0
        assert score.forget_mended(session, run) == 1
        left = session.scalars(select(Score.failure).order_by(Score.response_id)).all()
        assert left == failures[1:]
