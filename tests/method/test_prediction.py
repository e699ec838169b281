"""Which definition predicts the students, with numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from persyn.method import prediction
from persyn.method.prediction import Trained


def trained(predicted: list[list[float]], scores: list[float], *, noise: float = 0.0, own: int = 0) -> Trained:
    """Students with these mean scores on 40 prompts, each from a source of its own."""
    signs = np.repeat([-noise, noise], 20)
    measured = [score + np.random.default_rng(row).permutation(signs) for row, score in enumerate(scores)]
    return Trained(np.array(predicted, dtype=np.float64), np.array(measured), np.arange(len(scores)), own)


def test_rank_correlations_by_hand() -> None:
    predicted = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])

    # Squared differences of ranks 0, 0, 1, 1: 1 - 6 * 2 / (4 * 15).
    assert prediction.spearman(predicted, np.array([10.0, 20.0, 40.0, 30.0]))[:2] == pytest.approx([0.8, -0.8])
    # Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: deviations multiply to 4.5, and their squares sum to 4.5 and 5.
    assert prediction.spearman(predicted, np.array([1.0, 2.0, 3.0, 4.0]))[2] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(prediction.spearman(predicted, np.array([1.0, 2.0, 3.0, 4.0]))[3])
    assert np.isnan(prediction.spearman(predicted, np.ones(4))).all()


def test_a_missing_score_is_left_out_of_a_student_s_mean() -> None:
    assert prediction.means(np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, 1.0]])).tolist() == [0.5, 1.0]


def test_a_definition_that_ranks_the_students_as_they_became_predicts() -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    found = prediction.judge(
        trained([scores, [-x for x in scores], [1, 4, 2, 8, 5, 7, 3, 6]], scores, noise=0.05, own=1)
    )

    assert (found.outcome, found.best) == ("predicts", 0)
    # Squared differences of ranks of the third: 0, 4, 1, 16, 0, 1, 16, 4, so 1 - 6 * 42 / (8 * 63).
    assert [each and round(each.mean, 3) for each in found.correlations] == [1.0, -1.0, 0.5]
    assert found.low > 0.5
    assert (found.gain.mean, found.gain.low > 0) == (2.0, True)


def test_the_run_s_own_definition_is_the_best_of_equals() -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = prediction.judge(trained([scores, [2 * x for x in scores]], scores, noise=0.02, own=1))

    assert (found.best, found.gain.mean) == (1, 0.0)


def test_students_that_differ_by_chance_tell_nothing() -> None:
    """Eight students answer 40 prompts at random: whatever ranks them by accident does not predict."""
    measured = (np.random.default_rng(3).random((8, 40)) < 0.5).astype(np.float64)
    found = prediction.judge(Trained(measured.mean(axis=1)[None], measured, np.arange(8), 0))

    assert (found.outcome, found.reason) == ("cannot tell", "no difference")


def test_few_students_tell_nothing() -> None:
    found = prediction.judge(trained([[1, 2, 3, 4, 5]], [0.1, 0.3, 0.5, 0.7, 0.9]))

    assert (found.outcome, found.reason) == ("cannot tell", "few students")


def test_where_the_students_differ_and_every_definition_is_wrong_about_them_none_predicts() -> None:
    scores = [0.05 * n for n in range(16)]
    found = prediction.judge(
        trained([[-x for x in scores], [abs(x - 0.3) * -1 - x for x in scores]], scores, noise=0.05)
    )

    assert (found.outcome, found.high < 0) == ("no definition predicts", True)


def test_students_of_one_source_count_as_one_observation() -> None:
    """The same eight students, of eight sources or of two."""
    scores = [0.1, 0.15, 0.2, 0.25, 0.6, 0.55, 0.7, 0.65]
    predicted = [[1, 2, 3, 4, 8, 7, 5, 6]]
    measured = trained(predicted, scores, noise=0.05).measured
    apart, together = (
        prediction.judge(Trained(np.array(predicted, dtype=np.float64), measured, np.array(units), 0))
        for units in (range(8), [0] * 4 + [1] * 4)
    )

    assert apart.low > together.low


def test_bounds_for_many_definitions_are_wider_than_for_one() -> None:
    chance = np.random.default_rng(0)
    scores = list(np.linspace(0, 1, 12))
    good = list(np.linspace(0, 1, 12) + chance.normal(0, 0.2, 12))
    others = [list(chance.random(12)) for _ in range(20)]
    one, many = (prediction.judge(trained([good, *more], scores, noise=0.1)) for more in ([], others))

    assert one.best == many.best == 0
    assert many.low < one.low
