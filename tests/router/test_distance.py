"""Distances between prompts by their words, on made-up domains."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from persyn.llm.protocols import Message
from persyn.method import novelty
from persyn.router import distance
from persyn.router.kinds.base import Prompts

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
THINGS = ("apples", "books", "coins", "eggs", "stamps", "marbles", "tickets", "pens")
TOPICS = ("a late delivery", "a broken lamp", "a lost key", "an invoice", "a holiday", "a new office", "a noisy flat")
TONES = ("polite", "short", "angry", "formal", "friendly", "honest")


def sums(draw: Random) -> str:
    one, other = draw.sample(NAMES, 2)
    start, more = draw.randrange(3, 90), draw.randrange(3, 90)
    return (
        f"{one} has {start} {draw.choice(THINGS)} and buys {more} {draw.choice(THINGS)} from {other}. "
        f"How many does {one} have after giving {draw.randrange(2, 9)} to {draw.choice(NAMES)}?"
    )


def letters(draw: Random) -> str:
    return (
        f"Write a {draw.choice(TONES)} letter to the {draw.choice(('landlord', 'shop', 'bank', 'school'))} about "
        f"{draw.choice(TOPICS)}, in at most {draw.randrange(50, 300)} words, and end with a {draw.choice(TONES)} wish."
    )


def conversations(texts: list[str]) -> list[list[Message]]:
    return [[{"role": "user", "content": text}] for text in texts]


def pools(known: object, new: object, seed: int, n: int = 40) -> novelty.Novelty:
    draw = Random(seed)
    made = [conversations([kind(draw) for _ in range(count)]) for kind, count in ((known, 60), (new, n))]  # type: ignore[operator]
    return novelty.compare(*distance.by_words(*made))


def test_prompts_of_the_same_domain_are_seldom_far_and_their_pool_is_not_refused() -> None:
    found = [pools(kind, kind, seed) for kind in (sums, letters) for seed in range(5)]

    assert np.mean([each.share for each in found]) < 0.1
    assert not any(each.is_much for each in found)


@pytest.mark.parametrize(("known", "new"), [(sums, letters), (letters, sums)])
def test_prompts_of_another_domain_are_far_nearly_always(known: object, new: object) -> None:
    found = pools(known, new, seed=1)

    assert found.share > 0.95
    assert found.is_much


def test_a_rare_word_counts_the_same_in_a_known_and_in_a_new_prompt() -> None:
    texts = ["red green", "red green", "red blue"]

    known, new = distance.by_words(conversations(texts), conversations(["red blue", "red black"]))

    # Without itself, "blue" is in no other of the 2 known prompts: 1 + ln 3; "red" is in both: 1. To "red green", that
    # is 1 + ln(4 / 4) and 1 + ln(4 / 3) among 3: the cosine is 1 / (|(1, 1 + ln 3)| |(1, 1 + ln(4 / 3))|).
    rare, common = 1 + np.log(3), 1 + np.log(4 / 3)
    assert known[2] == pytest.approx(1 - 1 / np.hypot(1, rare) / np.hypot(1, common))
    assert known[:2].tolist() == pytest.approx([0, 0], abs=0.001)
    assert new[0] == pytest.approx(0)
    assert new[1] > known[2] - 0.05


def test_states_are_compared_on_a_common_scale_and_each_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_CHUNK", 2)
    states = np.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-2.0, 1000.0]])

    known, new = distance._of_states(Prompts({"backbone": states}), Prompts({"backbone": np.array([[5.0, 0.0]])}))

    assert known.argmax() == 3  # after scaling, the large number is one of two
    assert known[0] == pytest.approx(new[0], abs=0.1)
    assert ((known >= 0) & (known <= 2)).all()
