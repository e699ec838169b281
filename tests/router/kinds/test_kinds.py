"""Every kind of router: what it must do whatever it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from persyn.router.kinds import choice, crossfit, files
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS

KINDS = list(ROUTERS)


def world(n: int = 120, *, seed: int = 0, missing: float = 0.0) -> tuple[Prompts, Examples]:
    """Prompts of two kinds, told by state, text and label; each kind has its best teacher, a third is good at both."""
    chance = np.random.default_rng(seed)
    kind = np.arange(n) % 2
    states = np.column_stack([2.0 * kind - 1.0, chance.normal(size=n)]) + 0.1 * chance.normal(size=(n, 2))
    rewards = np.where(kind[:, None] == [0, 1, 2], 1.0, [0.0, 0.0, 0.6]) + 0.1 * chance.random((n, 3))
    rewards[chance.random(rewards.shape) < missing] = np.nan
    texts = [f"{('add', 'rhyme')[k]} number {i % 7}" for i, k in enumerate(kind)]
    prompts = Prompts({"backbone": states}, texts, {"domain": [("sums", "poems")[k] for k in kind]})
    return prompts, Examples(rewards)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "static"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_router_learns_who_is_good_at_what(name: str, missing: float) -> None:
    prompts, examples = world(missing=missing)
    asked, _ = world(20, seed=1)
    assert ROUTERS[name].fit(prompts, examples).scores(asked).argmax(axis=1).tolist() == [0, 1] * 10


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_router_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    prompts, examples = world(missing=0.1)
    asked, _ = world(20, seed=1)
    fitted = ROUTERS[name].fit(prompts, examples)
    files.write(tmp_path, name, fitted)

    kind, restored = files.read(tmp_path)

    assert kind == name
    np.testing.assert_array_equal(restored.scores(asked), fitted.scores(asked))
    assert restored.explain(asked) == fitted.explain(asked)
    assert restored.settings == fitted.settings


@pytest.mark.parametrize("name", KINDS)
def test_without_a_preference_every_prompt_gets_finite_scores(name: str) -> None:
    prompts, _ = world(12)
    rewards = np.full((12, 3), 0.5)
    rewards[:, 2] = np.nan
    assert np.isfinite(ROUTERS[name].fit(prompts, Examples(rewards)).scores(prompts)).all()


@pytest.mark.parametrize("name", KINDS)
def test_labels_it_has_not_seen_and_missing_labels_are_no_error(name: str) -> None:
    prompts, examples = world()
    fitted = ROUTERS[name].fit(prompts, examples)
    asked = Prompts(prompts.states, prompts.texts, {"domain": ["riddles", None] * 60})
    assert np.isfinite(fitted.scores(asked)).all()


def test_out_of_fold_scores_come_from_routers_that_did_not_see_the_prompt() -> None:
    prompts, examples = world(20)
    fold = crossfit.folds(20, seed=0)
    scores = crossfit.cross_fitted(ROUTERS["static"], prompts, examples, fold)
    np.testing.assert_allclose(scores[fold == 0], np.tile(examples.rewards[fold != 0].mean(axis=0), (4, 1)))


def test_the_choice_takes_the_router_that_gains_and_says_how_much() -> None:
    prompts, examples = world()
    chosen = choice.choose(list(ROUTERS.values()), prompts, examples)
    assert chosen.kind != "static"
    assert chosen.scores.argmax(axis=1).tolist() == [0, 1] * 60
    assert [candidate.kind for candidate in chosen.candidates] == KINDS
    assert chosen.candidates[0].gain == 0.0
    assert "over the best single teacher" in chosen.why


def test_the_choice_is_static_where_the_prompt_tells_nothing() -> None:
    prompts, _ = world()
    rewards = np.random.default_rng(5).random((120, 3)) + np.array([0.0, 0.0, 0.5])
    assert choice.choose(list(ROUTERS.values()), prompts, Examples(rewards)).kind == "static"


def test_for_limits_the_choice_knows_where_the_leader_is_not_needed() -> None:
    # The first teacher is right everywhere. The other is right on every second prompt, as its text tells: the best
    # score gains nothing by that, and half of the prompts could cost less.
    prompts, _ = world()
    rewards = np.column_stack([np.ones(120), np.arange(120) % 2])
    free = choice.choose(list(ROUTERS.values()), prompts, Examples(rewards))
    weighed = choice.choose(list(ROUTERS.values()), prompts, Examples(rewards), is_weighed=True)

    assert free.kind == "static"
    assert weighed.kind != "static"
    behind = weighed.scores[:, 0] - weighed.scores[:, 1]
    assert behind[::2].min() > behind[1::2].max()
    assert weighed.why.startswith(f"{weighed.kind}: predicts rewards most surely (slope ")


def test_for_limits_the_choice_is_static_where_the_prompt_tells_nothing() -> None:
    prompts, _ = world()
    rewards = np.tile(np.random.default_rng(5).random((120, 1)), (1, 3))
    chosen = choice.choose(list(ROUTERS.values()), prompts, Examples(rewards), is_weighed=True)
    assert (chosen.kind, chosen.why) == ("static", "static: no router predicts rewards")
