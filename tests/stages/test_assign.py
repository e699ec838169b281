"""Assignments of calibration prompts, which follow their rewards."""

from __future__ import annotations

from sqlalchemy import select

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.results import Assignment, Score
from persyn.stages import assign
from tests.factories import make_response, make_router, make_run


def test_a_calibration_prompt_goes_to_its_best_response_or_to_its_only_one(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=4, calibration=3)
        run = session.get_one(Run, made.id)
        run.router_id = make_router(session, made)
        a, b = made.teacher_ids
        # Both are scored on the first prompt, only b on the second, nobody on the third.
        for place, teacher_id, quality in ((0, a, 1.0), (0, b, 0.0), (1, b, 0.0)):
            response_id = make_response(session, made.prompt_ids[place], teacher_id)
            for scorer_id, value in ((run.quality_scorer_id, quality), (run.learnability_scorer_id, -5.0)):
                session.add(Score(response_id=response_id, scorer_id=scorer_id, value=value, n_tokens=5, detail={}))
        session.flush()
        assign.plan(session, run)

    with database.read() as session:
        columns = Assignment.prompt_id, Assignment.teacher_id, Assignment.score, Assignment.margin, Assignment.reason
        found = [tuple(row) for row in session.execute(select(*columns).order_by(Assignment.prompt_id))]
    # At alpha 0.4 the first prompt's response by a has reward 0.6 for its quality; their learnability is equal.
    assert found == [
        (made.prompt_ids[0], a, 0.6, 0.6, "calibration"),
        (made.prompt_ids[1], b, None, None, "calibration"),
    ]
