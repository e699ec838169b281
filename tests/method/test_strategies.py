"""Each strategy on three prompts and three teachers, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from persyn.method import strategies
from persyn.method.rewards import Matrix
from persyn.method.strategies import StrategyInputs

NAN = np.nan
#: Three prompts, teachers a, b and c. Means: 0.5, 0.6, 0.4.
REWARDS = np.array([[1.0, 0.6, 0.0], [0.0, 0.6, 1.0], [0.5, 0.6, 0.2]])
#: Means: 2/3, 1/3, 1.
QUALITY = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
#: Mean losses: 1, 0.5, 4 nats per token.
LEARNABILITY = np.array([[-1.0, -0.5, -4.0], [-1.0, -0.5, -4.0], [-1.0, -0.5, -4.0]])
KNOWN = StrategyInputs(
    rewards=REWARDS,
    quality=QUALITY,
    learnability=LEARNABILITY,
    sizes=np.array([7.0, 1.0, 70.0]),
    families=["x", "y", "z"],
    family="x",
    teachers=["a", "b", "c"],
    price_in=np.ones(3),
    price_out=np.ones(3),
)
ALL = np.ones((3, 3), dtype=np.bool_)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("static", [0, 1, 0]),  # the highest mean reward
        ("strong", [0, 0, 1]),  # the largest
        ("family-strong", [1, 0, 0]),  # the largest of the student's family
        ("mix", [0, 0.8, 0.2]),  # the largest with probability 1/5, otherwise the smallest
        ("random", [1 / 3, 1 / 3, 1 / 3]),
        # CAR = quality / (1 + 3 loss): (2/3)/4 = 0.1667, (1/3)/2.5 = 0.1333, 1/13 = 0.0769
        ("car", [1, 0, 0]),
    ],
)
def test_a_strategy_that_reads_no_prompt_picks_what_it_says(kind: str, policy: list[float]) -> None:
    assert strategies.policy(kind, KNOWN, ALL, ratio=0.2, beta=3.0) == pytest.approx(np.array([policy] * 3))


def test_car_weighs_the_students_loss_by_beta() -> None:
    assert strategies.car(QUALITY, LEARNABILITY, beta=3.0) == pytest.approx([1 / 6, 2 / 15, 1 / 13])
    assert strategies.policy("car", KNOWN, ALL, ratio=0.2, beta=0.0)[0].tolist() == [0, 0, 1]  # quality alone


def test_car_of_logits_does_not_prefer_what_is_hard_to_learn() -> None:
    quality, learnability = np.array([[-2.0, -2.0, -4.0]]), np.array([[-1.0, -3.0, -1.0]])
    # Shifted by 4: 2 / 4, 2 / 10, 0 / 4.
    assert strategies.car(quality, learnability, beta=3.0) == pytest.approx([0.5, 0.2, 0.0])


def test_a_ranking_of_each_prompt_picks_each_prompts_best() -> None:
    assert strategies.by_ranking(REWARDS, ALL).argmax(axis=1).tolist() == [0, 2, 1]


def test_where_the_first_choice_is_missing_the_next_one_is_taken() -> None:
    present = np.array([[True, False, True], [True, True, False], [False, False, False]])
    assert strategies.policy("static", KNOWN, present, ratio=0.2, beta=3.0).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 0],
    ]
    assert strategies.policy("random", KNOWN, present, ratio=0.2, beta=3.0).tolist() == [
        [0.5, 0, 0.5],
        [0.5, 0.5, 0],
        [0, 0, 0],
    ]


def test_equal_teachers_are_taken_in_head_order_and_unknown_ones_last() -> None:
    assert strategies.by_ranking(np.array([NAN, 1.0, 1.0]), ALL)[0].tolist() == [0, 1, 0]


def test_family_strong_goes_by_size_within_the_family_however_strong_others_are() -> None:
    strength = strategies.family_strength(np.array([7.0, 1.0, 70.0]), ["x", "x", "z"], "x")
    assert np.argsort(-strength).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no teacher is of the student's family 'q'; the teachers' families: x, z"):
        strategies.family_strength(np.array([7.0, 1.0, 70.0]), ["x", "x", "z"], "q")
    with pytest.raises(ValueError, match="the student has no family; the teachers' families: x, z"):
        strategies.family_strength(np.array([7.0, 1.0, 70.0]), ["x", "x", "z"], None)


def test_strength_is_not_guessed() -> None:
    unknown = replace(KNOWN, sizes=np.array([7.0, NAN, 70.0]))
    for kind in ("strong", "mix", "family-strong"):
        with pytest.raises(ValueError, match="needs params_b of every teacher"):
            strategies.policy(kind, unknown, ALL, ratio=0.2, beta=3.0)


def test_a_policy_is_followed_in_its_proportions() -> None:
    policy: Matrix = np.array([[0.0, 0.8, 0.2]] * 4)
    assert strategies.draw(policy, np.array([0.0, 0.79, 0.81, 1 - 2**-53])).tolist() == [1, 1, 2, 2]


def test_a_policy_is_ranked_by_asking_it_again_without_its_choices() -> None:
    present = np.array([[True, True, True], [True, False, True], [False, False, True]])
    strength = np.array([0.2, 0.5, 0.1])

    found = strategies.places(lambda left: strategies.by_ranking(strength, left), present, np.array([0.3, 0.6, 0.9]))

    nan = np.nan
    np.testing.assert_array_equal(found, [[-1, 0, -2], [0, nan, -1], [nan, nan, 0]])


def test_the_places_of_random_choices_are_different_teachers() -> None:
    lots = np.linspace(0.0, 0.999, 50)

    found = strategies.places(strategies.random, np.ones((50, 4), dtype=np.bool_), lots)

    assert (np.sort(found, axis=1) == [-3, -2, -1, 0]).all()
    first = strategies.draw(strategies.random(np.ones((50, 4), dtype=np.bool_)), lots)
    assert (found[np.arange(50), first] == 0).all()
