"""What each definition chooses and predicts, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from persyn.student import pilot_plan
from persyn.student.pilot_plan import Definition

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
