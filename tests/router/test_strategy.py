"""Custom strategies receive the permitted inputs, and an error fails only one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persyn.errors import EngineError
from persyn.llm.protocols import Failed, ModelSpec, Result, Route, Routed
from persyn.method.strategies import StrategyInputs
from persyn.router import strategy
from tests.foreign import write_module

NAN = np.nan
SOURCE = """
from functools import cache
import numpy as np

@cache
def means(known):
    topics = [prompt["meta"]["topic"] for prompt in known.prompts]
    return {topic: known.rewards[[t == topic for t in topics]].mean(axis=0) for topic in set(topics)}

def by_topic(prompts, known, weight=1.0):
    return [weight * means(known)[prompt["meta"]["topic"]] for prompt in prompts]

def by_length(prompts, known):
    return [[len(prompt["messages"][-1]["content"]), len(known.teachers), 0] for prompt in prompts]

def only(prompts, known, returns):
    return np.nan if returns == "nan" else returns

def vain(prompts, known):
    known.rewards[0] = 0

number = 7
"""
#: Three calibration prompts and three teachers. Means for sums: 0.75, 0.25, 0.5; the only poem stands for itself.
KNOWN = StrategyInputs(
    rewards=np.array([[1.0, 0.0, 0.5], [0.5, 0.5, 0.5], [0.0, 0.25, 1.0]]),
    quality=np.array([[1.0, 0.0, NAN], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
    learnability=-np.ones((3, 3)),
    sizes=np.array([1.0, NAN, 70.0]),
    families=["x", None, "z"],
    family="x",
    teachers=["ada", "bob", "cyd"],
    price_in=np.array([NAN, NAN, 1.0]),
    price_out=np.array([NAN, NAN, 2.0]),
    prompts=[{"messages": [], "meta": {"topic": topic}} for topic in ("sums", "sums", "poems")],
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write_module(tmp_path, monkeypatch, SOURCE)


def ask(model: str, routes: Sequence[Route], **options: Any) -> list[Result]:
    known = {"known": strategy.pack(KNOWN), "options": options}
    engine = strategy.load(ModelSpec("strategy", model, options=known), lambda: None)
    engine.submit(routes)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


def about(number: int, topic: str) -> Route:
    return Route(number, [{"role": "user", "content": "Why?"}], {"topic": topic})


def test_a_function_learns_from_the_calibration_prompts_and_scores_every_teacher(module: str) -> None:
    found = ask(f"{module}:by_topic", [about(1, "poems"), about(2, "sums"), about(3, "poems")])
    assert found == [Routed(1, [0.0, 0.25, 1.0]), Routed(2, [0.75, 0.25, 0.5]), Routed(3, [0.0, 0.25, 1.0])]


def test_options_are_its_further_arguments(module: str) -> None:
    assert ask(f"{module}:by_topic", [about(1, "sums")], weight=2.0) == [Routed(1, [1.5, 0.5, 1.0])]
    (wrong,) = ask(f"{module}:by_topic", [about(1, "sums")], wait=2.0)
    assert isinstance(wrong, Failed)
    assert wrong.reason.startswith("strategy_error: TypeError: by_topic() got an unexpected keyword argument 'wait'")


def test_it_reads_the_turns_and_the_teachers_names(module: str) -> None:
    assert ask(f"{module}:by_length", [about(1, "")]) == [Routed(1, [4.0, 3.0, 0.0])]


def test_where_it_raises_for_one_prompt_the_others_have_their_scores(module: str) -> None:
    found = ask(f"{module}:by_topic", [about(1, "poems"), about(2, "jokes"), about(3, "sums")])
    assert found == [
        Routed(1, [0.0, 0.25, 1.0]),
        Failed(2, "strategy_error: KeyError: 'jokes'"),
        Routed(3, [0.75, 0.25, 0.5]),
    ]


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ([[1, 2]], "it must return scores of shape (1, 3), a row for each prompt, got (1, 2)"),
        ([1, 2, 3], "it must return scores of shape (1, 3), a row for each prompt, got (3,)"),
        ("nan", "it must return scores of shape (1, 3), a row for each prompt, got ()"),
        ([[1, float("nan"), 3]], "every score must be a finite number, got nan"),
        ([[1, float("inf"), 3]], "every score must be a finite number, got inf"),
        ([["a", "b", "c"]], "could not convert string to float"),
    ],
)
def test_what_is_no_row_of_scores_for_each_prompt_is_refused(module: str, returns: Any, said: str) -> None:
    (found,) = ask(f"{module}:only", [about(1, "sums")], returns=returns)
    assert isinstance(found, Failed)
    assert found.reason.startswith("strategy_error: ValueError: ")
    assert said in found.reason


def test_what_is_known_arrives_as_it_was_and_cannot_be_written_into(module: str) -> None:
    found = strategy.unpack(strategy.pack(KNOWN))
    for name in ("rewards", "quality", "learnability", "sizes", "price_in", "price_out"):
        np.testing.assert_array_equal(getattr(found, name), getattr(KNOWN, name))
    assert (found.families, found.teachers, found.prompts) == (KNOWN.families, KNOWN.teachers, KNOWN.prompts)
    assert strategy.pack(found) == strategy.pack(KNOWN)  # otherwise each job would load its engine again
    (refused,) = ask(f"{module}:vain", [about(1, "sums")])
    assert refused == Failed(1, "strategy_error: ValueError: assignment destination is read-only")


def test_a_grid_without_a_prompt_keeps_its_teachers() -> None:
    empty = np.empty((0, 3))
    found = strategy.unpack(strategy.pack(replace(KNOWN, rewards=empty, quality=empty, learnability=empty, prompts=[])))
    assert found.rewards.shape == (0, 3)


def test_what_is_no_function_is_refused(module: str) -> None:
    for model, said in [(f"{module}:number", "is not a function"), ("no_such_module:f", "No module named")]:
        with pytest.raises(EngineError, match=said):
            ask(model, [])
