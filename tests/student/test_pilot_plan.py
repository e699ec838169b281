"""What each definition chooses and predicts, computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from persyn.cli import pilot as cli
from persyn.db.catalog import Prompt, Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.errors import UsageError
from persyn.llm.protocols import Failed, Generated
from persyn.settings import Settings
from persyn.student import become, pilot, pilot_plan
from persyn.student.become import Became
from persyn.student.pilot_plan import Definition, PilotSettings
from tests.factories import MadeRun, make_response, make_run, make_scorer

QUALITY, EASE = Definition("log_likelihood", 0.0), Definition("log_likelihood", 1.0)


def test_a_definition_chooses_the_highest_reward_and_among_equal_ones_by_the_seed_s_lots() -> None:
    one, other = np.array([[1.0, 0.0], [0.2, 0.7]]), np.full((200, 2), 0.5)

    assert pilot_plan.choose(one, seed=0).tolist() == [0, 1]
    assert 0.3 < pilot_plan.choose(other, seed=0).mean() < 0.7
    assert pilot_plan.choose(other, seed=0).tolist() == pilot_plan.choose(2 * other, seed=0).tolist()
    assert pilot_plan.choose(other, seed=0).tolist() != pilot_plan.choose(other, seed=1).tolist()


def test_equal_choices_are_one_student_and_a_source_s_students_share_a_unit() -> None:
    half = Definition("log_likelihood", 0.5)
    rewards = {
        QUALITY: np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        half: np.array([[0.5, 0.6], [0.0, 1.0], [1.0, 0.5]]),
        EASE: np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]),
    }

    found = pilot_plan._choices(["a", "b"], rewards, seeds=2)

    assert [(each.names, each.teachers.tolist()) for each in found] == [
        (["a"], [[0, 0, 0]] * 2),
        (["b", "log_likelihood, alpha 1"], [[1, 1, 1]] * 2),
        (["quality alone"], [[0, 1, 0]] * 2),
        (["log_likelihood, alpha 0.5"], [[1, 1, 0]] * 2),
    ]
    assert [each.unit for each in found] == [0, 1, 2, 3]


def test_a_prediction_is_the_mean_reward_of_what_was_chosen_over_prompts_and_seeds() -> None:
    rewards = np.array([[0.2, 0.8], [0.6, 0.4], [0.0, 1.0]])

    # (0.2 + 0.4 + 0) / 3 with the first seed, and (0.2 + 0.4 + 1) / 3 with the second.
    assert pilot_plan._mean_reward(rewards, np.array([[0, 1, 0], [0, 1, 1]])) == pytest.approx(2.2 / 6)


def make_grid(session: Session, *, unlearned: int = 0) -> MadeRun:
    """A scored run of 18 prompts and teachers a, b and c; b is right about odd prompts, and c answers few.

    unlearned: prompts to whose responses the student gave no log-likelihood.
    """
    made = make_run(session, teachers="abc", prompts=18, calibration=12, holdout=6, stage="fit_router")
    run = session.get_one(Run, made.id)
    run.quality_scorer_id = make_scorer(session, "math")
    student, quality = {"name": "student", "model": "lab/student"}, {"kind": "math"}
    run.config = {**run.config, "student": student, "quality": quality}
    for number, prompt_id in enumerate(made.prompt_ids):
        for name, teacher_id in zip("abc", made.teacher_ids, strict=True):
            if name == "c" and number >= 3:
                make_response(session, prompt_id, teacher_id, None, failure="empty: x")
                continue
            response_id = make_response(session, prompt_id, teacher_id, f"{name} {number}")
            scores = {run.quality_scorer_id: (float(name == "a" or number % 2), None)}
            if number >= unlearned:
                scores[run.learnability_scorer_id] = (-20.0 if name == "a" else -10.0, 10)
            for scorer_id, (value, n_tokens) in scores.items():
                session.add(
                    Score(response_id=response_id, scorer_id=scorer_id, value=value, n_tokens=n_tokens, detail={})
                )
    session.flush()
    return made


def test_a_plan_learns_from_calibration_prompts_and_asks_the_hold_out(database: Database) -> None:
    with database.write() as session:
        made = make_grid(session)
        plan = pilot_plan.read(session, session.get_one(Run, made.id), PilotSettings(alphas=[1.0], prompts=10))

    assert (plan.by, plan.is_scored, plan.teacher_ids) == ("quality", True, made.teacher_ids[:2])
    assert plan.left_out["c"].startswith("only 17% of its responses")
    assert plan.left_out["ifd"].startswith("learnability ifd needs the statistics")
    assert len(plan.learn_ids) == 10
    assert set(plan.learn_ids) < set(made.prompt_ids[:12])
    assert plan.asked_ids == made.prompt_ids[12:]
    # Of odd prompts both are right.
    assert plan.best.tolist() == [[True, False], [True, True]] * 3
    assert list(plan.definitions) == [Definition("log_likelihood", 0.4), Definition("log_likelihood", 1.0)]
    # 0.4 of even prompts: a has 0.6 and b 0.4; of odd ones, where both are right, 0 and 0.4.
    odd = [prompt_id in made.prompt_ids[1::2] for prompt_id in plan.learn_ids]
    assert plan.choices[2].teachers.tolist() == [list(map(int, odd))]
    assert plan.predicted()[:, 2] == pytest.approx([np.mean([0.4 if each else 0.6 for each in odd]), np.mean(odd)])


def test_what_a_student_learns_and_is_shown_is_the_chosen_teacher_s(database: Database) -> None:
    with database.write() as session:
        made = make_grid(session)
        plan = pilot_plan.read(session, session.get_one(Run, made.id), PilotSettings(alphas=[1.0], seeds=2))
    jobs = list(pilot._jobs(database, plan))

    assert [job.settings and job.settings.seed for job in jobs] == [None, 0, 1, 0, 1, 0, 1]
    assert [each.response for each in jobs[3].conversations] == [f"b {number}" for number in range(12)]
    assert [each.response for each in jobs[0].judged] == [
        f"{name} {number}" for number in range(12, 18) for name in "ab" if name == "a" or number % 2
    ]
    assert len({job.key() for job in jobs}) == 7


def test_of_several_samples_the_first_of_the_highest_quality_is_learned_and_shown(database: Database) -> None:
    with database.write() as session:
        made = make_grid(session)
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "run": {**run.config["run"], "samples": 4}}
        for row in session.scalars(select(Response).where(Response.text.startswith("a"))).all():
            first = session.get_one(Score, (row.id, run.quality_scorer_id))
            for sample, value in ((1, 1.0), (2, 1.0), (3, None), (4, 1.0)):
                text = f"a {sample} {row.prompt_id}"
                response_id = make_response(session, row.prompt_id, row.teacher_id, text, sample=sample)
                failure = None if value else "x"
                session.add(
                    Score(response_id=response_id, scorer_id=first.scorer_id, value=value, failure=failure, detail={})
                )
            first.value = 0.0
        session.flush()
        plan = pilot_plan.read(session, run, PilotSettings())
        cells = {(prompt_id, made.teacher_ids[0]) for prompt_id in made.prompt_ids}
        found = pilot._responses(session, plan, cells)

    assert [found[prompt_id, made.teacher_ids[0]].response for prompt_id in made.prompt_ids] == [
        f"a 1 {prompt_id}" for prompt_id in made.prompt_ids
    ]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_quality_is_stored_for_the_answers_and_rows_that_it_was_scored_by(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        made = make_grid(session)
        plan = pilot_plan.read(session, session.get_one(Run, made.id), PilotSettings())
    student = Became("0123456789abcdef", ["\\boxed{7}", *[None] * 5], [], None)
    (tmp_path / pilot.FOLDER / student.key).mkdir(parents=True)

    asked: list[int] = []

    def quality(answer: str, progress: pilot.PilotCallback = lambda _, total, *__: asked.append(total)) -> list[float]:
        with database.write() as session:
            session.get_one(Prompt, plan.asked_ids[0]).answer = answer
        settings = Settings(str(database.url), tmp_path)
        found: list[float] = pilot._quality(database, plan, settings, [student], progress)[0].tolist()
        return found

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quality("7", killed)
    assert quality("7") == pytest.approx([1.0, *[np.nan] * 5], nan_ok=True)
    assert asked == []  # what arrived before the kill is kept
    (file,) = (tmp_path / pilot.FOLDER / student.key).glob("quality-*")
    file.write_text("[null, null, null, null, null, null]")  # as where it failed
    assert quality("7") == pytest.approx([1.0, *[np.nan] * 5], nan_ok=True)
    assert asked == [1]
    assert quality("8") == pytest.approx([0.0, *[np.nan] * 5], nan_ok=True)


def test_a_response_that_calls_a_tool_is_not_scored_as_a_text() -> None:
    calls = [{"function": {"name": "search", "arguments": {}}}]
    called = Generated(0, "", "stop", prompt_tokens=1, response_tokens=1, seconds=1, tool_calls=calls)
    answered = Generated(0, "Yes.", "stop", prompt_tokens=1, response_tokens=1, seconds=1)
    assert [become._text(each) for each in (called, answered, Failed(0, "empty: x"))] == [None, "Yes.", ""]


def test_prompts_without_learnability_are_left_out_and_many_of_them_end_the_pilot(database: Database) -> None:
    with database.write() as session:
        made = make_grid(session, unlearned=1)
        run = session.get_one(Run, made.id)
        plan = pilot_plan.read(session, run, PilotSettings())
        assert made.prompt_ids[0] not in plan.learn_ids + plan.asked_ids

    with database.write() as session:
        session.execute(delete(Score).where(Score.n_tokens.is_not(None)))
        with pytest.raises(UsageError, match="has no learnability of 100% of its calibration responses"):
            pilot_plan.read(session, session.get_one(Run, made.id), PilotSettings())


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_plan_says_how_many_requests_a_judge_may_get(database: Database) -> None:
    with database.write() as session:
        run = session.get_one(Run, make_grid(session).id)
        run.config = {**run.config, "quality": {"kind": "judge"}}
        likely, judged = (pilot_plan.read(session, run, PilotSettings(by=by)) for by in (None, "quality"))

    assert "requests" not in cli._planned(likely, total=4, done=0)
    # 4 students answer 6 prompts each.
    assert cli._planned(judged, total=4, done=0).endswith("; at most 24 requests to the judge, outside [budget]")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_run_that_no_pilot_can_be_made_of_is_refused_with_what_to_do(database: Database) -> None:
    with database.write() as session:
        run = session.get_one(Run, make_grid(session).id)
        own, quality = run.config, [{"kind": "math", "gate": True}, {"kind": "judge", "weight": 1.0}]
        run.config = {name: table for name, table in own.items() if name != "quality"} | {"quality": quality}
        with pytest.raises(UsageError, match="math and judge, which a pilot does not combine; use --by likelihood"):
            pilot_plan.read(session, run, PilotSettings(by="quality"))
        run.config, run.stage, run.state, run.error = own, "score", RunState.PAUSED, "budget: usd of the run"
        with pytest.raises(
            UsageError, match=r"its calibration grid yet; to continue it: raise \[budget\] in the run's file"
        ):
            pilot_plan.read(session, run, PilotSettings())
        run.learnability_scorer_id = None
        with pytest.raises(UsageError, match="no learnability whose definitions to compare: the run is at alpha 0"):
            pilot_plan.read(session, run, PilotSettings())
