"""Generate the demo's prompts: six kinds of small questions, each with a number as its answer.

`python -m demo.prompts prompts.jsonl` writes them. They do not contain the teachers' worked examples.
"""

from __future__ import annotations

import json
import random
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

#: The run file, whose teachers' worked examples are excluded.
RUN_FILE = Path(__file__).with_name("run.toml")
PER_GROUP = 40

_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry")
_THINGS = ("apples", "books", "coins", "marbles", "pens", "stamps")
_WARES = ("book", "lamp", "pen", "ticket")
_ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def write(path: Path, seed: int = 0) -> int:
    """Write the prompts as JSONL and return their number; the same seed gives the same file."""
    records = make(seed)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return len(records)


def make(seed: int = 0) -> list[dict[str, str]]:
    """`PER_GROUP` distinct prompts of every group, shuffled, as {id, prompt, answer, group}."""
    taken = worked_examples()
    records = []
    for group, questions in GROUPS.items():
        new = _distinct(questions(random.Random(f"{seed} {group}")), taken)
        for number, (prompt, answer) in enumerate(islice(new, PER_GROUP)):
            records.append({"id": f"{group}-{number:02}", "prompt": prompt, "answer": str(answer), "group": group})
    random.Random(seed).shuffle(records)
    return records


def worked_examples() -> set[str]:
    """The questions in the worked examples of the run file's teachers."""
    teachers = tomllib.loads(RUN_FILE.read_text(encoding="utf-8"))["teachers"]
    return {shot["user"] for teacher in teachers for shot in teacher.get("few_shot", [])}


def sums(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Sums of two numbers with up to two digits, from reasoning-gym."""
    import reasoning_gym

    questions = reasoning_gym.create_dataset(
        "basic_arithmetic",
        seed=rng.randrange(2**31),
        size=10 * PER_GROUP,
        min_terms=2,
        max_terms=2,
        min_digits=2,
        max_digits=2,
        operators=("+",),
        allow_parentheses=False,
        allow_negation=False,
    )
    for question in questions:
        first, second = question["metadata"]["expression"].split(" + ")
        # In words, because a response that merely repeats "4 + 3" would be equal to 7.
        yield f"What is {first} plus {second}?", int(question["answer"])


def stories(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Word problems: somebody has some things and buys a few more."""
    while True:
        name, things = rng.choice(_NAMES), rng.choice(_THINGS)
        before, bought = rng.randint(3, 12), rng.randint(2, 9)
        question = f"{name} has {before} {things} and buys {bought} more. How many are there now?"
        yield question, before + bought


def costs(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Word problems: a price times a count."""
    while True:
        ware, price, count = rng.choice(_WARES), rng.randint(2, 9), rng.randint(2, 9)
        yield f"One {ware} costs {price} dollars. How much do {count} {ware}s cost?", price * count


def firsts(rng: random.Random) -> Iterator[tuple[str, int]]:
    """The first of four numbers."""
    while True:
        numbers = rng.sample(range(10, 100), 4)
        yield f"What is the first of the numbers {', '.join(map(str, numbers))}?", numbers[0]


def lasts(rng: random.Random) -> Iterator[tuple[str, int]]:
    """The last of four numbers."""
    while True:
        numbers = rng.sample(range(10, 100), 4)
        yield f"What is the last of the numbers {', '.join(map(str, numbers))}?", numbers[-1]


def numerals(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Two-digit numbers in words."""
    for number in rng.sample(range(11, 100), 89):
        yield f"Write {spell(number)} in digits.", number


def spell(number: int) -> str:
    """A number from 1 to 99 in words."""
    if number < 20:
        return (_ONES + _TEENS)[number]
    tens, ones = divmod(number, 10)
    return f"{_TENS[tens]}-{_ONES[ones]}" if ones else _TENS[tens]


GROUPS: dict[str, Callable[[random.Random], Iterator[tuple[str, int]]]] = {
    "sum": sums,
    "story": stories,
    "cost": costs,
    "first": firsts,
    "last": lasts,
    "numeral": numerals,
}


def _distinct(questions: Iterator[tuple[str, int]], taken: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the questions that are not taken, and mark them as taken."""
    for question, answer in questions:
        if question not in taken:
            taken.add(question)
            yield question, answer


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} prompts in {sys.argv[1]}")
