"""The estimates behind the kinds of routers, calculated by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from persyn.router.kinds import choice, clusters, crossfit, design, deviations, linear, neighbours, stacked, tuning
from persyn.router.kinds.base import Examples, Group, Near, Prompts, Words
from persyn.router.kinds.registry import ROUTERS

NAN = math.nan


def test_a_deviation_is_what_the_teachers_mean_and_the_prompts_level_leave() -> None:
    found = deviations.of(Examples(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])))

    assert found.rows.tolist() == [0, 1, 2]  # equal rewards tell nothing
    np.testing.assert_allclose(found.means, [2 / 3, 1 / 3])
    np.testing.assert_allclose(found.values, [[1 / 3, -1 / 3], [-2 / 3, 2 / 3], [1 / 3, -1 / 3]])
    assert found.weights.tolist() == [[1, 1]] * 3


def test_a_missing_cell_has_no_weight_and_does_not_move_the_others() -> None:
    found = deviations.of(Examples(np.array([[1.0, 0.0, NAN], [0.0, 1.0, 0.5], [1.0, 0.0, 0.5]])))

    np.testing.assert_allclose(found.means, [2 / 3, 1 / 3, 0.5])
    np.testing.assert_allclose(found.values[0], [1 / 3, -1 / 3, 0.0])
    assert found.weights.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]


def test_a_cell_with_an_error_weighs_as_much_as_of_its_variance_is_not_error() -> None:
    rewards = np.array([[1.0, 0.0], [0.0, 1.0]])  # every deviation is half a unit
    found = deviations.of(Examples(rewards, errors=np.array([[0.25, 0.0], [0.0, 0.0]])))

    exact = (4 * 0.25 - 0.0625) / 4
    np.testing.assert_allclose(found.weights, [[exact / (exact + 0.0625), 1.0], [1.0, 1.0]])


def test_the_mean_of_a_group_shrinks_by_the_variance_inside_it() -> None:
    values, groups = np.array([[1.0], [0.5], [-1.0], [-0.5]]), np.array([0, 0, 1, 1])
    effect = clusters.effect_of(values, np.ones((4, 1)), groups, 2)

    # Means 0.75 and -0.75; squares around them 4 * 0.0625 over 4 - 2 freedoms; (2 * 0.5625 - 0.125) * 2 groups / 4.
    assert effect.within.tolist() == [0.125]
    assert effect.between == 0.5
    # The variance inside is less than ten times that between: means are held back as by ten further prompts.
    np.testing.assert_allclose(effect.shrunk(effect.total, effect.count), [[1.5 / 12], [-1.5 / 12]])
    # Without the first prompt, its group has one value, 0.5.
    assert effect.left_out(values, np.ones((4, 1)), groups)[0] == pytest.approx(0.5 / 11)
    varied = replace(effect, within=np.array([20.0]))
    np.testing.assert_allclose(varied.shrunk(np.array([[1.5]]), np.array([[2.0]])), [[1.5 * 0.5 / (2 * 0.5 + 20.0)]])


def test_groups_that_do_not_differ_add_nothing() -> None:
    values, groups = np.array([[1.0], [-1.0], [1.0], [-1.0]]), np.array([0, 0, 1, 1])
    effect = clusters.effect_of(values, np.ones((4, 1)), groups, 2)
    assert effect.between == 0
    assert effect.shrunk(effect.total, effect.count).tolist() == [[0.0], [0.0]]


def test_neighbours_average_the_similar_prompts_and_ignore_the_others() -> None:
    states = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [-1.0, 0.1]])
    examples = Examples(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    fitted = neighbours.fit(Prompts({"backbone": states}), examples, settings={"count": 3})

    # Two neighbours with deviation 0.5, and 20 without one; the third is on the other side.
    expected = 0.5 + np.array([[2 * 0.5 / 22, -2 * 0.5 / 22]])
    asked = Prompts({"backbone": np.array([[1.0, 0.025]])})
    np.testing.assert_allclose(fitted.scores(asked), expected)
    near = fitted.explain(asked)[0][0]
    assert isinstance(near, Near)
    assert sorted(near.prompts) == [0, 1]


def test_ridge_regression_has_the_closed_form_and_its_leave_one_out_is_that_of_refitting() -> None:
    chance = np.random.default_rng(0)
    rows, values = chance.normal(size=(12, 3)), chance.normal(size=(12, 2))
    known = deviations.Deviations(np.zeros(2), np.arange(12), values, values, np.ones((12, 2)))
    given = linear._Rows(rows[:, :2], csr_matrix(rows[:, 2:]))
    ridge = linear._Ridge(*linear._decomposed(given, lambda: None), known)

    expected = np.linalg.solve(rows.T @ rows + 5.0 * np.eye(3), rows.T @ values)
    np.testing.assert_allclose(given.transposed(ridge.dual(5.0)), expected)
    others = np.linalg.solve(rows[1:].T @ rows[1:] + 5.0 * np.eye(3), rows[1:].T @ values[1:])
    np.testing.assert_allclose(ridge._left_out(5.0)[0], rows[0] @ others)


@pytest.mark.parametrize("is_tall", [True, False])
@pytest.mark.parametrize("most", [9, 0])
def test_the_regression_of_many_rows_and_features_is_that_of_their_main_directions(
    monkeypatch: pytest.MonkeyPatch, most: int, is_tall: bool
) -> None:
    # Four directions that matter, and hardly any noise.
    monkeypatch.setattr(linear, "_MOST_EXACT", most)
    monkeypatch.setattr(linear, "_RANK", 6)
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(30, 4)) @ chance.normal(size=(4, 9)) + 1e-4 * chance.normal(size=(30, 9))
    rows = rows if is_tall else rows.T
    values = chance.normal(size=(len(rows), 2))
    known = deviations.Deviations(np.zeros(2), np.arange(len(rows)), values, values, np.ones(values.shape))
    ticks: list[None] = []
    given = linear._Rows(rows[:, :2], csr_matrix(rows[:, 2:]))
    ridge = linear._Ridge(*linear._decomposed(given, lambda: ticks.append(None)), known)

    exact = np.linalg.solve(rows.T @ rows + 3.0 * np.eye(rows.shape[1]), rows.T @ values)
    np.testing.assert_allclose(given.transposed(ridge.dual(3.0)), exact, atol=1e-9 if most else 1e-3)
    assert len(ticks) >= 2


def test_ridge_regression_weighs_cells() -> None:
    chance = np.random.default_rng(0)
    rows, values = chance.normal(size=(12, 3)), chance.normal(size=(12, 1))
    weights = chance.choice([0.0, 0.5, 1.0], size=(12, 1))
    known = deviations.Deviations(np.zeros(1), np.arange(12), values, values, weights)
    ridge = linear._Ridge(*np.linalg.eigh(rows @ rows.T), known)

    expected = np.linalg.solve(rows.T @ (weights * rows) + 5.0 * np.eye(3), rows.T @ (weights * values))
    np.testing.assert_allclose(rows.T @ ridge.dual(5.0), expected, atol=1e-4)


def test_linear_names_the_words_that_tell_teachers_apart() -> None:
    texts = ["the sum", "the poem"] * 30
    fitted = linear.fit(
        Prompts(texts=texts), Examples(np.array([[1.0, 0.0], [0.0, 1.0]] * 30)), settings={"penalty": 3.0}
    )
    [[words]] = fitted.explain(Prompts(texts=["the poem, the poem"]))
    assert isinstance(words, Words)
    assert words.words[0].text in ("poem", "the poem")
    assert words.words[0].weights[1] > 0 > words.words[0].weights[0]


def test_a_mix_takes_the_scores_that_predict_and_leaves_out_those_that_do_not() -> None:
    rewards = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    good = 0.5 * (rewards - 0.5)
    weights = stacked.best_weights({"good": good, "bad": -good}, Examples(rewards))
    assert weights == pytest.approx({"good": 2.0, "bad": 0.0})


def test_a_setting_is_judged_by_the_rewards_of_the_teachers_it_takes() -> None:
    rewards = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    # Wrong about the third teacher, which it never takes; and close to all rewards, but taking the wrong ones.
    routes, is_close = np.array([[0.6, 0.4, -5.0], [0.4, 0.6, -5.0]]), np.array([[0.4, 0.5, 0.0], [0.5, 0.4, 0.0]])
    assert tuning.best([is_close, routes], rewards) == 1
    assert tuning.best([routes, routes], rewards) == 0


@pytest.mark.parametrize(("within", "taken"), [((1.5, 0.0, 0.0), 1), ((1.5, 0.0, 1.0), 2), ((2.0, 0.0, 1.0), 0)])
def test_a_kind_is_preferred_within_its_standard_errors(within: tuple[float, ...], taken: int) -> None:
    # The first teacher alone is right on the first prompt, the second alone on the next five, and both on the others.
    # The first kind always takes the first teacher, the others the second: better by 0.04 +- 0.024.
    rewards = np.ones((100, 2))
    rewards[0], rewards[1:6] = [1.0, 0.0], [0.0, 1.0]
    kinds = [replace(ROUTERS["head"], name=f"{place}", preferred_within=each) for place, each in enumerate(within)]
    out = [np.tile(scores, (100, 1)) for scores in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0])]
    assert choice._Candidates(kinds, out, Examples(rewards)).preferred(np.ones(100, dtype=np.bool_)) == taken


def test_the_scale_turns_differences_of_scores_into_log_odds() -> None:
    # The favoured teacher wins 3 of 4 times: log-odds log 3 for a difference of 0.1.
    examples = Examples(np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]))
    scale = choice.log_odds_scale(np.tile([0.1, 0.0], (4, 1)), examples)
    assert 0.1 * scale == pytest.approx(math.log(3), rel=1e-3)


@pytest.mark.parametrize("n_rare", [1, 2])
def test_a_label_of_few_prompts_hardly_moves_the_scores_however_uniform_the_others_are(n_rare: int) -> None:
    # Who is right follows from the label alone, and the first leads.
    labels = [*["a", "b", "a"] * 40, *["rare"] * n_rare]
    rewards = np.array([[1.0, 0.0] if label == "a" else [0.0, 1.0] for label in labels])
    fitted = clusters.fit(Prompts(fields={"domain": labels}), Examples(rewards))

    usual, rare, unknown = fitted.scores(Prompts(fields={"domain": ["b", "rare", None]}))

    assert (usual.argmax(), rare.argmax(), unknown.argmax()) == (1, 0, 0)
    assert np.ptp(rare - unknown) < 0.25 * np.ptp(usual - unknown)


def test_a_field_of_ids_has_no_label_that_a_router_knows() -> None:
    prompts = Prompts(fields={"id": [str(n) for n in range(50)], "domain": ["a", "b"] * 25})
    assert design.fit(prompts).labels == {"id": [], "domain": ["a", "b"]}


@pytest.mark.parametrize("name", ["clusters", "linear", "head"])
def test_a_label_with_one_prompt_is_held_back(name: str) -> None:
    labels = [*["a", "b"] * 100, "rare"]
    chance = np.random.default_rng(0)
    right = np.where(np.arange(201)[:, None] % 2 == 0, [0.95, 0.4], [0.5, 0.7])  # the first is the best single one
    rewards = (chance.random((201, 2)) < right).astype(float)
    rewards[200] = [0.0, 1.0]
    prompts = Prompts(fields={"domain": labels})
    fitted = ROUTERS[name].fit(prompts, Examples(rewards))

    usual, rare, unknown = fitted.scores(Prompts(fields={"domain": ["b", "rare", None]}))

    assert (usual.argmax(), unknown.argmax()) == (1, 0)
    assert np.ptp(rare - unknown) < 0.5 * np.ptp(usual - unknown)


def test_a_group_is_explained_by_its_label_and_size() -> None:
    prompts = Prompts(fields={"domain": ["a", "b"] * 10})
    fitted = clusters.fit(prompts, Examples(np.array([[1.0, 0.0], [0.0, 1.0]] * 10)))
    [[group], []] = fitted.explain(Prompts(fields={"domain": ["b", "unknown"]}))
    assert isinstance(group, Group)
    assert (group.field, group.label, group.n_prompts) == ("domain", "b", 10)
    assert group.scores == [-0.25, 0.25]  # ten prompts weigh as much as the ten that hold back


def test_all_kinds_share_the_fits_of_a_bench() -> None:
    prompts = Prompts(fields={"domain": ["a", "b"] * 20})
    bench = crossfit.Bench(prompts, Examples(np.array([[1.0, 0.0], [0.0, 1.0]] * 20)))
    mixed, _ = bench.fitted(ROUTERS["stacked"])
    assert isinstance(mixed, stacked.Stacked)
    assert all(bench.fitted(ROUTERS[name])[0] is member for name, member in mixed.members.items())
