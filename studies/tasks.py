"""Generate tasks of eight kinds with checkable answers, and check responses to them.

Five kinds are the demo's, with numbers as answers: sums of reasoning-gym, two kinds of word problems, and two of lists.
Two are about words: name the one of three that is of a category, and write a sentence that follows an instruction.
One asks for a Python function of one line, which is tested in the sandbox.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from demo import prompts
from persyn.llm.sandbox import box
from persyn.llm.scorers import code_tests
from persyn.llm.scorers.instruction_checks import CHECKS, arguments

Task: TypeAlias = dict[str, Any]
"""A row of a prompts' file: `prompt`, `kind`, and an `answer` (some with words `among`), `instruction` or `tests`."""

_MEMBERS = {
    "an animal": "horse dog cat cow sheep lion bear wolf rabbit goat".split(),  # noqa: SIM905
    "a fruit": "apple banana cherry grape lemon mango peach pear plum melon".split(),  # noqa: SIM905
    "a color": "red blue green yellow purple pink brown black white gray".split(),  # noqa: SIM905
    "a tool": "hammer saw drill wrench shovel axe rake chisel pliers ladder".split(),  # noqa: SIM905
    "a city": "Paris London Rome Berlin Madrid Tokyo Cairo Vienna Oslo Dublin".split(),  # noqa: SIM905
}
_TOPICS = (
    *("the sea", "a garden", "music", "the moon", "a train", "winter", "bread", "a river", "books", "a bridge"),
    *("rain", "a market", "a school", "snow", "a farm", "a city", "a storm", "summer", "a ship", "a forest"),
)
_WORDS = "light water morning quiet people old small walk bright home slow green road time deep warm".split()  # noqa: SIM905
#: What a function does with x, as an expression of x and a number.
_FUNCTIONS = {
    "adds {n} to x": "{x} + {n}",
    "subtracts {n} from x": "{x} - {n}",
    "multiplies x by {n}": "{x} * {n}",
    "divides x by {n}": "{x} / {n}",
    "returns the larger of x and {n}": "max({x}, {n})",
    "returns the smaller of x and {n}": "min({x}, {n})",
}
_CODE_LIMITS = box.Limits(timeout_seconds=5.0, memory_mb=512)
#: Worked examples of the three teachers that are not the demo's.
WORKED = {
    "smollm2-member": [
        {"user": "Which of these is a fruit: ladder, melon or Oslo?", "assistant": "A melon is a fruit."},
        {"user": "Which of these is a tool: saw, pink or goat?", "assistant": "A saw is a tool."},
        {"user": "Which of these is a city: peach, rake or Cairo?", "assistant": "Cairo is a city."},
        {"user": "Which of these is an animal: wolf, axe or brown?", "assistant": "A wolf is an animal."},
        {"user": "Which of these is a color: Dublin, gray or cow?", "assistant": "Gray is a color."},
    ],
    "smollm2-writer": [
        {"user": "Write a sentence about a school with the word old.", "assistant": "The old school has a bell."},
        {"user": "Write a sentence about snow of less than 7 words.", "assistant": "Snow fell all night."},
        {
            "user": "Write a sentence about a farm and green things, in quotation marks.",
            "assistant": '"The green field lies behind the farm."',
        },
        {"user": "Write a sentence about summer with the word road.", "assistant": "In summer the road is dusty."},
    ],
    "smollm2-coder": [
        {"user": "Write a Python function f that adds 61 to x.", "assistant": "def f(x): return x + 61"},
        {
            "user": "Write a Python function f that returns the larger of x and 62.",
            "assistant": "def f(x): return max(x, 62)",
        },
        {"user": "Write a Python function f that multiplies x by 63.", "assistant": "def f(x): return x * 63"},
        {"user": "Write a Python function f that subtracts 64 from x.", "assistant": "def f(x): return x - 64"},
    ],
}
#: This many tasks in a row that were drawn before mean that a kind has no more.
_PATIENCE = 1_000


def members(rng: random.Random) -> Iterator[Task]:
    """Which of three words is of a category."""
    while True:
        (category, right), *others = rng.sample(list(_MEMBERS.items()), 3)
        answer = rng.choice(right)
        among = [answer, *(rng.choice(words) for _, words in others)]
        rng.shuffle(among)
        listed = f"{among[0]}, {among[1]} or {among[2]}"
        yield {"prompt": f"Which of these is {category}: {listed}?", "answer": answer, "among": among}


def sentences(rng: random.Random) -> Iterator[Task]:
    """Write a sentence with a given word, of few words, or in quotation marks."""
    while True:
        topic, word, bound = rng.choice(_TOPICS), rng.choice(_WORDS), rng.randint(5, 12)
        said, instruction, kwargs = rng.choice(
            [
                (f"with the word {word}", "keywords:existence", {"keywords": [word]}),
                (
                    f"of less than {bound} words",
                    "length_constraints:number_words",
                    {"num_words": bound, "relation": "less than"},
                ),
                (f"and {word} things, in quotation marks", "startend:quotation", {}),
            ]
        )
        yield {"prompt": f"Write a sentence about {topic} {said}.", "instruction": instruction, "kwargs": kwargs}


def functions(rng: random.Random) -> Iterator[Task]:
    """Write a Python function of one line that does something with x and a number."""
    while True:
        said, expression = rng.choice(list(_FUNCTIONS.items()))
        n = rng.randint(2, 60)
        # On both sides of the number, so that no two expressions agree.
        tests = [f"assert f({x}) == {expression.format(x=x, n=n)}" for x in (n - 1, n + 2)]
        yield {"prompt": f"Write a Python function f that {said.format(n=n)}.", "tests": tests}


def _with_number(kind: str, rng: random.Random) -> Iterator[Task]:
    """Tasks of one of the demo's kinds; those that are finite are drawn again."""
    for prompt, answer in chain.from_iterable(prompts.GROUPS[kind](rng) for _ in range(_PATIENCE)):
        yield {"prompt": prompt, "answer": str(answer)}


KINDS: Mapping[str, Callable[[random.Random], Iterator[Task]]] = {
    **{kind: partial(_with_number, kind) for kind in ("sum", "story", "cost", "first", "last")},
    "member": members,
    "sentence": sentences,
    "function": functions,
}


def draw(kinds: list[str], n: int, *, seed: int) -> list[Task]:
    """N distinct tasks, in equal parts of each kind as far as it has that many, shuffled; without worked examples."""
    taken = {*prompts.worked_examples(), *(shot["user"] for shots in WORKED.values() for shot in shots)}
    found: list[Task] = []
    for place, kind in enumerate(kinds):
        new = _distinct(KINDS[kind](random.Random(f"{seed} {kind}")), taken)
        share = n // len(kinds) + (place < n % len(kinds))
        found += [{**task, "kind": kind} for task in islice(new, share)]
    random.Random(seed).shuffle(found)
    return found


def write(path: Path, tasks: Sequence[Task]) -> None:
    """Write tasks as a prompts' file."""
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))


def is_right(messages: Any, response: str, answer: str | None, meta: Mapping[str, Any]) -> float:
    """The study's quality: 1 for the right last number, for the right word and none of the others, for a sentence as
    instructed, or for a function that passes its tests."""
    if "tests" in meta:
        code = code_tests.code_of(response) or ""
        return float(not any(box.run_tests(code, box.Tests(tests=meta["tests"]), _CODE_LIMITS, stop_early=True)))
    if "instruction" in meta:
        check = CHECKS[meta["instruction"]]
        return float(bool(response.strip()) and check(response, **arguments(check, meta["kwargs"])))
    if "among" in meta:
        named = [word for word in meta["among"] if re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE)]
        return float(named == [answer])
    return float(re.findall(r"\d+", response)[-1:] == [answer])


def _distinct(tasks: Iterator[Task], taken: set[str]) -> Iterator[Task]:
    misses = 0
    for task in tasks:
        misses += 1
        if task["prompt"] not in taken:
            misses = 0
            taken.add(task["prompt"])
            yield task
        if misses > _PATIENCE:
            return
