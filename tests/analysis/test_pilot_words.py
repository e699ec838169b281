"""What a pilot says and advises, for students with given scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from persyn.analysis import pilot as words
from persyn.analysis.pilot import PilotFacts
from persyn.errors import UsageError
from persyn.llm.protocols import ModelSpec
from persyn.method.intervals import Vector
from persyn.student.pilot import Outcomes
from persyn.student.pilot_plan import Choice, Definition, PilotSettings, Plan

OWN, OTHER = Definition("log_likelihood", 0.4), Definition("ifd", 1.0)
#: Eight students, each of the only response of one teacher.
SCORES = np.linspace(0.1, 0.8, 8)


def facts(rewards: dict[Definition, Sequence[float]], *, scores: Vector = SCORES, noise: float = 0.05) -> PilotFacts:
    """What a pilot found whose definitions give these rewards to the teachers."""
    choices = [Choice([f"teacher {column}"], column, np.array([[column]])) for column in range(8)]
    for definition, of_teachers in rewards.items():
        choices[int(np.argmax(of_teachers))].names.append(str(definition))
    signs = np.repeat([-noise, noise], 20)
    measured = np.array([score + np.random.default_rng(n).permutation(signs) for n, score in enumerate(scores)])
    plan = Plan(
        run_id=1,
        run="run",
        settings=PilotSettings(),
        by="quality",
        is_scored=True,
        spec=ModelSpec("", "student"),
        revision=None,
        learn_ids=[1],
        asked_ids=list(range(40)),
        teacher_ids=list(range(8)),
        definitions={name: np.array([of_teachers]) for name, of_teachers in rewards.items()},
        own=list(rewards).index(OWN),
        choices=choices,
        best=np.ones((40, 8), dtype=np.bool_),
        left_out={},
    )
    untrained = np.zeros((1, 1, 40))
    return words.facts(plan, Outcomes(measured[:, None] - 1, measured[:, None], untrained - 1, untrained))


def test_a_better_definition_is_advised_with_its_lines_of_the_run_file() -> None:
    found = facts({OWN: -SCORES, OTHER: SCORES})

    assert found.outcome == "predicts"
    assert found.says.startswith("ifd, alpha 1 predicts best: ")
    assert "(rank correlation +1.00, at least +1.00 also as the best of 2 definitions and 8 students)" in found.says
    assert found.advice.startswith("take ifd, alpha 1: its rank correlation is +2.00 (at least +2.00) above that of ")
    assert found.run_file == '[run]\nlearnability = "ifd"\nalpha = 1\n'
    first, last = found.definitions
    assert (first.learnability, first.predicted, first.is_own) == ("ifd", pytest.approx(0.8), False)
    assert first.score.mean == pytest.approx(0.8)
    assert (last.predicted, last.score.mean) == (pytest.approx(-0.1), pytest.approx(0.1))
    assert found.students[0].trained_on == ["teacher 7", "ifd, alpha 1"]


def test_a_definition_that_predicts_better_and_whose_student_is_worse_is_not_advised() -> None:
    """It confuses only the two best students, so takes the second; the run's own is wrong about all but the best."""
    other = SCORES[[0, 1, 2, 3, 4, 5, 7, 6]]
    own = np.where(np.arange(8) == 7, 0.9, -SCORES)
    found = facts({OWN: own, OTHER: other})

    assert (found.outcome, found.run_file) == ("predicts", "")
    assert found.advice.startswith("keep yours, log_likelihood, alpha 0.4: none is shown to predict better, with a ")


def test_a_definition_that_is_hardly_better_is_not_advised() -> None:
    found = facts({OWN: SCORES[[1, 0, 2, 3, 4, 5, 6, 7]], OTHER: SCORES})

    assert found.says.startswith("ifd, alpha 1 predicts best")
    assert found.advice.startswith("keep yours")


def test_quality_alone_needs_no_learnability() -> None:
    found = facts({OWN: -SCORES, Definition("log_likelihood", 0.0): SCORES})

    assert found.run_file == "[run]\nalpha = 0\n"
    assert found.says.startswith("quality alone predicts best")


def test_the_own_definition_is_kept_where_it_is_the_best() -> None:
    found = facts({OWN: SCORES, OTHER: -SCORES})

    assert (found.outcome, found.advice) == ("predicts", "keep yours, log_likelihood, alpha 0.4")


def test_where_all_definitions_are_wrong_none_predicts() -> None:
    found = facts({OWN: -SCORES, OTHER: -(SCORES**2)})

    assert found.says.startswith("no definition predicts what the student becomes: the students differ")
    assert found.advice.startswith("keep yours")


def test_students_that_do_not_differ_tell_nothing() -> None:
    found = facts({OWN: SCORES, OTHER: -SCORES}, scores=np.full(8, 0.5), noise=0.5)

    assert found.says.startswith("cannot tell: the students differ by no more than the choice of the asked prompts")


def test_no_score_at_all_is_said() -> None:
    with pytest.raises(UsageError, match="has nothing to judge its students by: no response of a student was scored"):
        facts({OWN: SCORES, OTHER: -SCORES}, scores=np.full(8, np.nan))
