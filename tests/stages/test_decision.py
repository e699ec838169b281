"""The decision to route is made once, on the verdict, and holds whoever continues the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from msgspec.structs import replace
from sqlalchemy import delete, func, select, update

from persyn.analysis import verdict as words
from persyn.config import load_config
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.connect import Database
from persyn.db.results import Assignment, Router, RouterScore, Score
from persyn.db.work import Event
from persyn.errors import UsageError
from persyn.runs import pipeline, run_file
from persyn.stages import assign, verdict
from tests.factories import MadeRun, make_response, make_router, make_run
from tests.run_files import write_run

CALIBRATION, HOLDOUT, TARGETS = 48, 12, 5
MakeRun: TypeAlias = Callable[..., MadeRun]


@pytest.fixture
def judged(database: Database) -> MakeRun:
    """Makes a run with a scored grid: a is right on 3 of 4 prompts, b on every fourth.

    knows: whether the router's cross-fitted scores say which; otherwise it always takes a.
    """

    def make(*, knows: bool, when_unsure: str | None = "static") -> MadeRun:
        with database.write() as session:
            prompts = CALIBRATION + HOLDOUT + TARGETS
            made = make_run(session, prompts=prompts, calibration=CALIBRATION, holdout=HOLDOUT, stage="assign")
            run = session.get_one(Run, made.id)
            run.router_id = make_router(session, made)
            run.config = {**run.config, "strategy": {**run.config["strategy"], "when_unsure": when_unsure}}
            for place, prompt_id in enumerate(made.prompt_ids[: CALIBRATION + HOLDOUT]):
                of_b = place % 4 == 3
                for k, teacher_id in enumerate(made.teacher_ids):
                    response_id = make_response(session, prompt_id, teacher_id)
                    for scorer_id, value in (
                        (run.quality_scorer_id, float(of_b == bool(k))),
                        (run.learnability_scorer_id, -5.0),
                    ):
                        session.add(
                            Score(response_id=response_id, scorer_id=scorer_id, value=value, n_tokens=5, detail={})
                        )
                    unseen = float((of_b if knows else False) == bool(k))
                    is_held = place >= CALIBRATION
                    session.add(
                        RouterScore(
                            router_id=run.router_id,
                            prompt_id=prompt_id,
                            teacher_id=teacher_id,
                            score=unseen if is_held else 0.0,
                            cross_fitted=None if is_held else unseen,
                        )
                    )
            return made

    return make


def plan(database: Database, made: MadeRun) -> int:
    with database.write() as session:
        return assign.plan(session, session.get_one(Run, made.id))


def reasons(database: Database, made: MadeRun) -> dict[tuple[str, int], int]:
    """{(reason, teacher): prompts}."""
    with database.read() as session:
        key = Assignment.reason, Assignment.teacher_id
        rows = session.execute(
            select(*key, func.count())
            .where(Assignment.run_id == made.id, Assignment.reason != "calibration")
            .group_by(*key)
        )
        return {(reason, teacher_id): count for reason, teacher_id, count in rows}


def decisions(database: Database, made: MadeRun) -> list[dict[str, object]]:
    with database.read() as session:
        details = session.scalars(select(Event.detail).where(Event.run_id == made.id).order_by(Event.id))
        return [detail["decided"] for detail in details if "decided" in detail]


def test_a_run_whose_router_gains_is_routed(database: Database, judged: MakeRun) -> None:
    made = judged(knows=True)

    assert plan(database, made) == 1
    assert reasons(database, made) == {}
    assert [decided["verdict"] for decided in decisions(database, made)] == ["route"]


@pytest.mark.parametrize(
    ("when_unsure", "jobs", "assigned"),
    [("static", 0, {"verdict: cannot tell": TARGETS}), ("route", 1, {}), (None, 1, {})],
)
def test_without_evidence_the_best_teacher_answers_unless_the_run_file_says_otherwise(
    database: Database, judged: MakeRun, when_unsure: str | None, jobs: int, assigned: dict[str, int]
) -> None:
    made = judged(knows=False, when_unsure=when_unsure)

    assert plan(database, made) == jobs
    assert {reason: count for (reason, _), count in reasons(database, made).items()} == assigned
    assert {teacher_id for _, teacher_id in reasons(database, made)} <= {made.teacher_ids[0]}
    # A run of a version without verdicts routes, and records nothing.
    assert len(decisions(database, made)) == (when_unsure is not None)


def test_a_decision_is_not_made_again_when_the_grid_changes_after_a_kill(database: Database, judged: MakeRun) -> None:
    made = judged(knows=False)
    plan(database, made)
    with database.write() as session:
        # Killed after some assignments; meanwhile the scores say that b leads, and the router knows everything.
        last = made.prompt_ids[-2:]
        session.execute(delete(Assignment).where(Assignment.prompt_id.in_(last)))
        session.execute(update(Score).values(value=1 - Score.value).where(Score.scorer_id == 1))
        for place, prompt_id in enumerate(made.prompt_ids[: CALIBRATION + HOLDOUT]):
            wins = made.teacher_ids[place % 4 != 3]
            of_prompt = update(RouterScore).where(RouterScore.prompt_id == prompt_id)
            session.execute(of_prompt.values(score=0, cross_fitted=0))
            session.execute(of_prompt.where(RouterScore.teacher_id == wins).values(score=1, cross_fitted=1))
    with database.read() as session:
        assert verdict.of_run(session, session.get_one(Run, made.id)).outcome == "route"

    assert plan(database, made) == 0
    assert reasons(database, made) == {("verdict: cannot tell", made.teacher_ids[0]): TARGETS}
    assert len(decisions(database, made)) == 1


def test_a_killed_plan_leaves_neither_a_decision_nor_assignments(database: Database, judged: MakeRun) -> None:
    made = judged(knows=False)
    with database.write() as session:
        assign.plan(session, session.get_one(Run, made.id))
        session.rollback()

    assert (decisions(database, made), reasons(database, made)) == ([], {})
    plan(database, made)
    assert reasons(database, made) == {("verdict: cannot tell", made.teacher_ids[0]): TARGETS}


def test_a_router_that_was_not_cross_fitted_has_no_verdict_without_a_hold_out_and_says_why(
    database: Database, judged: MakeRun
) -> None:
    made = judged(knows=True)
    with database.write() as session:
        session.execute(update(RouterScore).values(cross_fitted=None))
        session.execute(update(RunPrompt).where(RunPrompt.role == Role.HOLDOUT).values(role=Role.CALIBRATION))
    with database.read() as session, pytest.raises(UsageError, match="earlier version, which did not cross-fit it"):
        verdict.of_run(session, session.get_one(Run, made.id))

    assert plan(database, made) == 0
    assert reasons(database, made) == {("verdict: none", made.teacher_ids[0]): TARGETS}


@pytest.mark.parametrize("tune", ["full", "head"])
def test_a_tuned_router_and_one_of_an_earlier_version_are_judged_on_the_hold_out(
    database: Database, judged: MakeRun, tune: str
) -> None:
    made = judged(knows=True)
    with database.write() as session:
        session.execute(update(RouterScore).values(cross_fitted=None))
        session.execute(update(Router).values(tune=tune))
    with database.read() as session:
        assert verdict.of_run(session, session.get_one(Run, made.id)).n_measured == HOLDOUT


def test_the_verdict_says_what_it_found_by_group(database: Database, judged: MakeRun) -> None:
    made = judged(knows=True)
    with database.write() as session:
        for place, prompt_id in enumerate(made.prompt_ids):
            session.get_one(Prompt, prompt_id).meta = {"kind": "words" if place % 4 == 3 else "sums"}
    with database.read() as session:
        run = session.get_one(Run, made.id)
        found = words.facts(session, run, by="kind")
        of_source = words.facts(session, run)
        with pytest.raises(UsageError, match="cannot be grouped by 'topic': none of them has such a field"):
            words.facts(session, run, by="topic")

    assert found.verdict is not None
    assert of_source.verdict is not None
    assert of_source.verdict.groups == []  # all prompts are of one source
    # At alpha 0.4 and with equal learnability a right response has reward 0.6.
    assert found.says.startswith("route: the router's expected gain over the best single teacher, a, is +0.150")
    assert [(group.group, group.teacher) for group in found.verdict.groups] == [("words", "b"), ("sums", "a")]
    assert found.warnings[0].startswith("measured on 60 calibration prompts")
    assert found.decided is None


def test_a_field_of_ids_is_no_group_and_that_is_said(database: Database, judged: MakeRun) -> None:
    made = judged(knows=True)
    with database.write() as session:
        for prompt_id in made.prompt_ids:
            session.get_one(Prompt, prompt_id).meta = {"row": prompt_id}
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "router": {**run.config["router"], "features": ["row"]}}
    with database.read() as session:
        run = session.get_one(Run, made.id)
        found = words.facts(session, run)
        with pytest.raises(UsageError, match="by 'row': it has 60 different values on 60 prompts; take a field"):
            words.facts(session, run, by="row")

    assert found.verdict is not None
    assert (found.verdict.groups, found.verdict.by_group) == ([], None)
    assert "no figures by group: 'row' is not a group" in found.warnings[-1]


def test_a_new_run_is_static_when_unsure_and_an_old_one_routes_as_it_was_started(
    database: Database, tmp_path: Path
) -> None:
    file = write_run(tmp_path, prompts=15)
    file.write_text(file.read_text().replace('when_unsure = "route"\n', ""))
    config = run_file.read(file)
    with database.write() as session:
        run = pipeline.start_run(session, config, actor="me")
        assert load_config(run.config).strategy.when_unsure == "static"
        assert pipeline.start_run(session, config, actor="me").id == run.id

        table = {name: value for name, value in run.config["strategy"].items() if name != "when_unsure"}
        run.config = {**run.config, "strategy": table}
        assert pipeline.start_run(session, config, actor="me").id == run.id
        assert load_config(run.config).strategy.when_unsure is None
        told = replace(config, strategy=replace(config.strategy, when_unsure="static"))
        with pytest.raises(UsageError, match="when_unsure was not set and is 'static'"):
            pipeline.start_run(session, told, actor="me")
