"""Who is asked about a response, and the quality that follows, case by case."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from persyn.config import COMBINED
from persyn.db.catalog import Role, Run, RunPrompt, Scorer
from persyn.db.connect import Database
from persyn.db.results import NO_TEXT, Assignment, Response, Score
from persyn.stages import combining, generate, rejection, score
from persyn.stages.batch import Progress
from tests.factories import digest, make_config, make_response, make_run, make_scorer

#: A gate, and a logit whose weighted value is 0, 1 or -1: the quality is 1 + 1 / (1 + e^-x).
WEIGHT = 0.1
EVEN, GOOD, BAD = 1.5, 1.7310585786300048, 1.2689414213699951
FAILED = "too_long: 9 tokens, the model takes 8"


class Made(NamedTuple):
    """A run of two teachers and one calibration prompt, with a gate and a reward model."""

    run: Run
    responses: list[int]
    gate: int
    logit: int
    quality: int
    prompt: int
    teacher: int


def make(session: Session, weight: float | None = WEIGHT) -> Made:
    made = make_run(session, prompts=1, calibration=1, stage="score")
    gate, logit = make_scorer(session, "math"), make_scorer(session, "reward_model")
    parts = [{"scorer": digest("scorer math None"), "weight": None}]
    parts.append({"scorer": digest("scorer reward_model None"), "weight": weight})
    quality = Scorer(fingerprint=digest("both"), kind=COMBINED, model="", options={"parts": parts})
    session.add(quality)
    session.flush()
    run = session.get_one(Run, made.id)
    config = make_config("run").frozen()
    config["quality"] = [
        {"kind": "math", "gate": True},
        {"kind": "reward_model", "model": "m", "weight": WEIGHT},
    ]
    run.config, run.quality_scorer_id, run.learnability_scorer_id = config, quality.id, None
    responses = [make_response(session, made.prompt_ids[0], teacher_id) for teacher_id in made.teacher_ids]
    return Made(run, responses, gate, logit, quality.id, made.prompt_ids[0], made.teacher_ids[0])


def add(session: Session, response_id: int, scorer_id: int, found: float | str) -> None:
    value = {"failure": found} if isinstance(found, str) else {"value": found}
    session.add(Score(response_id=response_id, scorer_id=scorer_id, detail={}, **value))
    session.flush()


def grid(run: Run) -> Any:
    return score._responses(run)


@pytest.mark.parametrize(
    ("gate", "logit", "quality", "asked"),
    [
        (None, None, None, "gate"),
        (1.0, None, None, "logit"),
        (0.0, None, 0.0, ""),
        (0.0, 8.0, 0.0, ""),  # scored for another run
        (1.0, 0.0, EVEN, ""),
        (1.0, 10.0, GOOD, ""),
        (1.0, -10.0, BAD, ""),
        (None, 10.0, None, "gate"),
        (None, FAILED, None, "gate"),  # failed for another run; the gate may decide
        (1.0, FAILED, "too_long: reward_model: 9 tokens, the model takes 8", ""),
        ("no_answer", None, "no_answer: math", ""),  # undecided: nobody knows whether it passes
        (0.0, FAILED, 0.0, ""),
    ],
)
def test_a_response_has_its_quality_as_soon_as_its_scores_decide_it(
    database: Database, gate: float | str | None, logit: float | str | None, quality: float | str | None, asked: str
) -> None:
    with database.write() as session:
        made = make(session)
        for scorer_id, found in ((made.gate, gate), (made.logit, logit)):
            if found is not None:
                add(session, made.responses[0], scorer_id, found)

        for _ in range(2):  # twice is the same as once
            combining.store(session, made.run, grid(made.run))

        stored = session.scalars(select(Score).where(Score.scorer_id == made.quality)).all()
        assert [each.failure or each.value for each in stored] == pytest.approx([] if quality is None else [quality])
        assert [each.response_id for each in stored] == made.responses[: len(stored)]
        of_first = Response.id == made.responses[0]
        wanted = {
            name: session.scalars(
                grid(made.run).where(of_first, combining.is_wanted(session, made.run, scorer_id))
            ).all()
            for name, scorer_id in (("gate", made.gate), ("logit", made.logit))
        }
        assert [name for name, found in wanted.items() if found] == ([asked] if asked else [])
        done, failed = isinstance(quality, float), isinstance(quality, str)
        assert score.progress(session, made.run) == Progress(2, done, failed)


def test_a_second_gate_is_asked_only_while_it_may_decide(database: Database) -> None:
    with database.write() as session:
        made = make(session, weight=None)
        add(session, made.responses[0], made.gate, 0.0)
        combining.store(session, made.run, grid(made.run))

        wanted = grid(made.run).where(combining.is_wanted(session, made.run, made.logit))
        assert session.scalars(wanted.with_only_columns(Response.id)).all() == made.responses[1:]


def test_planning_makes_jobs_for_the_gate_first_and_then_for_what_passed(database: Database) -> None:
    with database.write() as session:
        made = make(session)
        assert score.plan(session, made.run) == 1
        add(session, made.responses[0], made.gate, 1.0)
        add(session, made.responses[1], made.gate, 0.0)

        assert score.plan(session, made.run) == 1
        missing = score._missing(session, made.run, made.logit)
        assert session.scalars(missing.with_only_columns(Response.id)).all() == made.responses[:1]
        add(session, made.responses[0], made.logit, 0.0)
        assert score.plan(session, made.run) == 0

        values = select(Score.value, Score.detail).where(Score.scorer_id == made.quality).order_by(Score.response_id)
        assert [tuple(row) for row in session.execute(values)] == [
            (EVEN, {"values": [1.0, 0.0]}),
            (0.0, {"values": [0.0, None]}),
        ]


def test_a_failure_that_is_retried_takes_the_quality_with_it(database: Database) -> None:
    with database.write() as session:
        made = make(session)
        for response_id in made.responses:
            add(session, response_id, made.gate, 1.0)
            add(session, response_id, made.logit, FAILED)
        combining.store(session, made.run, grid(made.run))

        assert score.forget(session, made.run, ["other"]) == 0
        assert score.progress(session, made.run) == Progress(2, 0, 2)
        assert score.forget(session, made.run, ["too_long"]) == 2  # those of the reward model
        assert score.progress(session, made.run) == Progress(2, 0, 0)


def test_a_failed_quality_follows_a_score_that_another_run_replaced(database: Database) -> None:
    with database.write() as session:
        made = make(session)
        add(session, made.responses[0], made.gate, "no_answer: none")
        combining.store(session, made.run, grid(made.run))
        session.execute(delete(Score).where(Score.scorer_id == made.gate))
        add(session, made.responses[0], made.gate, 0.0)

        assert score.forget_mended(session, made.run) == 1
        score.plan(session, made.run)
        assert session.scalars(select(Score.value).where(Score.scorer_id == made.quality)).all() == [0.0]


def test_scores_that_were_imported_without_a_text_are_combined_too(database: Database) -> None:
    with database.write() as session:
        made = make(session)
        values = {"text": None, "failure": f"{NO_TEXT}: only scores of this response were imported"}
        session.execute(update(Response).values(values))
        for scorer_id, value in ((made.gate, 1.0), (made.logit, 10.0)):
            add(session, made.responses[0], scorer_id, value)

        score.plan(session, made.run)

        stored = session.execute(select(Score.response_id, Score.value).where(Score.scorer_id == made.quality)).all()
        assert [tuple(row) for row in stored] == [(made.responses[0], pytest.approx(GOOD))]
        assert score.progress(session, made.run) == Progress(0, 0, 0)


def test_responses_outside_the_grid_have_the_quality_that_their_scores_say(database: Database) -> None:
    with database.write() as session:
        made = make(session)
        session.execute(update(RunPrompt).values(role=Role.TARGET))
        for response_id in made.responses:
            add(session, response_id, made.gate, 0.0)

        for plan in (score.plan, generate.STAGE.plan):
            plan(session, made.run)
            ran = session.execute(delete(Score).where(Score.scorer_id == made.quality).returning(Score.value)).all()
            assert [row.value for row in ran] == [0.0, 0.0]


def test_a_failure_that_no_quality_depends_on_is_not_retried(database: Database) -> None:
    with database.write() as session:
        made = make(session)
        add(session, made.responses[0], made.gate, 0.0)
        add(session, made.responses[0], made.logit, FAILED)  # of a run without the gate
        asked = {"run_id": made.run.id, "prompt_id": made.prompt, "teacher_id": made.teacher}
        session.add(Assignment(**asked, reason="router", sample=0))
        combining.store(session, made.run, grid(made.run))

        assert score.forget(session, made.run, ["too_long"]) == 0
        assert rejection.forget(session, made.run, ["too_long"]) == 0
        kept = select(Score.failure).where(Score.scorer_id == made.logit)
        assert session.scalars(kept).all() == [FAILED]
