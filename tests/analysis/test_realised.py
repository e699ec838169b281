"""Predicted and realised quality, worked by hand."""

from __future__ import annotations

import math

import pytest
from sqlalchemy import select, update

from persyn.analysis import realised, second_choices, summary
from persyn.db import grid
from persyn.db.catalog import Role, Run, RunPrompt
from persyn.db.connect import Database
from persyn.db.results import Assignment
from persyn.method import intervals
from persyn.method.intervals import Sample
from tests.factories import MadeRun, make_assignment
from tests.one_database import SQLITE
from tests.stages.test_fallback import Jobs
from tests.stages.test_limits import make


def assign_right(database: Database, **more: object) -> MadeRun:
    """A run whose router knows who is right, with its prompts assigned so: of 40 targets, 21 to a, 13 to b, 6 to c."""
    made = make(database)
    with database.write() as session:
        run = session.get_one(Run, made.id)
        run.config, run.stage = {**run.config, "generation": {"check": True}, **more}, "generate"
        roles = dict(session.execute(select(RunPrompt.prompt_id, RunPrompt.role)).all())
        for place, prompt_id in enumerate(made.prompt_ids):
            right = 0 if place % 6 < 3 else 1 if place % 6 < 5 else 2
            reason = "calibration" if roles[prompt_id] != Role.TARGET else "router: head"
            further = [each for each in made.teacher_ids if each != made.teacher_ids[right]]
            make_assignment(session, made.id, prompt_id, made.teacher_ids[right], reason=reason, further=further)
    return made


def test_a_teacher_that_is_worse_than_its_calibration_is_named_although_its_wrong_responses_are_left(
    database: Database,
) -> None:
    made = assign_right(database, fallback={"on": ["wrong"]})
    # a is wrong on 9 of its 21 prompts, and b is right on those
    wrong = iter([True] * 9 + [False] * 12)
    Jobs(
        database,
        made,
        lambda teacher, _: "wrong" if teacher == "a" and next(wrong) else "right",
        judge=lambda text: float(text == "right"),
    ).all()

    with database.read() as session:
        run = session.get_one(Run, made.id)
        a, b, c = realised.of_run(session, run, grid.read(session, run))
        assert [each.predicted for each in (a, b, c)] == [Sample(1.0, 0.0, n) for n in (24, 16, 8)]
        assert (a.realised.n, b.realised.n, c.realised.n) == (21, 13, 6)
        assert a.realised.mean == pytest.approx(12 / 21)
        assert a.realised.variance == pytest.approx((12 / 21) * (9 / 21) * 21 / 20)
        assert [each.is_worse for each in (a, b, c)] == [True, False, False]
        # 1.96 x sqrt(0.2571 / 21) = 0.217
        assert a.difference_words == "-0.429 (-0.645 to -0.212)"
        assert b.difference_words == "+0.000 (+0.000 to +0.000)"
        assert summary.facts(session, run).realised == [a, b, c]
        said = second_choices.sentences(session, run)[0]
        assert said.startswith("9 responses met a condition of [fallback] (wrong 9; a 9), and 9 prompts have")


@SQLITE
def test_within_limits_all_calibration_responses_predict(database: Database) -> None:
    made = assign_right(database)
    with database.write() as session:
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "strategy": {**run.config["strategy"], "capacity": {"a": 40}}}
        session.execute(update(Assignment).values(further=None))
    Jobs(database, made, lambda teacher, _: "right", judge=lambda text: 1.0).all()

    with database.read() as session:
        run = session.get_one(Run, made.id)
        found = realised.of_run(session, run, grid.read(session, run))
        means = [(each.predicted.mean, each.predicted.n) for each in found if each.predicted]
        assert means == [(pytest.approx(24 / 48), 48), (pytest.approx(16 / 48), 48), (pytest.approx(8 / 48), 48)]


def test_the_difference_of_two_means_has_welchs_interval() -> None:
    found = intervals.difference(Sample(0.5, 0.25, 100), Sample(0.7, 0.21, 100))

    error = math.sqrt(0.0025 + 0.0021)
    assert (found.mean, found.low) == (pytest.approx(-0.2), pytest.approx(-0.2 - 1.959964 * error))
    assert found.high == pytest.approx(-0.2 + 1.959964 * error)
