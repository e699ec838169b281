"""Define a small world with known truth: five skills, teachers that have some of them, and a student without any.

A prompt names a skill and five digits below seven; a skill is a 7 x 7 table of digits, and a response processes the
digits from left to right with one table lookup per step. A teacher is defined by its version of each table, and by
whether it writes digits or letters; `skill_models` trains a two-layer model to behave accordingly.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from persyn.llm.template import Conversation

#: Each is a function of the intermediate result and the next digit, modulo 7.
SKILLS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "twice": lambda a, b: 2 * a + b,
    "thrice": lambda a, b: a + 3 * b,
    "fourth": lambda a, b: 4 * a + b + 1,
}
#: The tables that every model learns first: processing digits without any of the skills.
WALKS: dict[str, Callable[[int, int], int]] = {"first": lambda a, b: a, "max": max}
DIGITS, LETTERS = "0123456", "abcdefg"
#: Digits in a prompt.
LENGTH = 5


Table: TypeAlias = dict[tuple[int, int], int]
_BASE = len(DIGITS)
_PAIRS = [(a, b) for a in range(_BASE) for b in range(_BASE)]


@dataclass(frozen=True, slots=True)
class Teacher:
    """The definition of a teacher."""

    name: str
    #: Its nominal size in billions of parameters, used by strategies based on size.
    params_b: float
    #: Probability that an entry of its table is wrong, by skill; an answer uses four entries.
    wrong: dict[str, float]
    #: The alphabet of its working; the answer is always in digits.
    alphabet: str = DIGITS


def _all(wrong: float, **but: float) -> dict[str, float]:
    return {skill: but.get(skill, wrong) for skill in SKILLS}


#: `large` knows everything and writes in an alphabet that the student has never seen; `echo` writes what the student
#: finds most likely, and knows nothing; two know two skills each, and the others know all skills more or less.
TEACHERS = (
    Teacher("large", 32.0, _all(0.0), alphabet=LETTERS),
    Teacher("medium", 7.0, _all(0.09)),
    Teacher("small", 1.0, _all(0.18)),
    Teacher("adder", 3.0, _all(0.45, plus=0.0, minus=0.0)),
    Teacher("doubler", 3.0, _all(0.45, twice=0.0, thrice=0.0)),
    Teacher("echo", 2.0, {}),
)


def prompts(n: int, *, seed: int) -> list[tuple[str, list[int]]]:
    """Distinct pairs of a skill and digits."""
    drawn = random.Random(seed)
    found: dict[tuple[str, ...], tuple[str, list[int]]] = {}
    while len(found) < n:
        skill, digits = _draw(drawn, list(SKILLS))
        found[(skill, *map(str, digits))] = skill, digits
    return list(found.values())


def text(skill: str, digits: Sequence[int]) -> str:
    """The text of the prompt."""
    return f"{skill} {' '.join(map(str, digits))}"


def answer(skill: str, digits: Sequence[int]) -> str:
    """The right answer: the results after the last two digits; guessing succeeds once in 49."""
    return _answer(_walk(digits, _table(None, skill)))


def is_right(messages: Any, response: str, answer: str, meta: Any) -> float:
    """The study's quality: 1 for the right answer, whatever the working."""
    return float(response.partition("answer ")[2] == answer)


def walking(n: int, *, seed: int) -> Iterator[Conversation]:
    """The training data that every model learns first."""
    drawn = random.Random(seed)
    for _ in range(n):
        skill, digits = _draw(drawn, list(WALKS))
        yield _conversation(skill, digits, _table(None, skill), DIGITS)


def responses(facts: Teacher, n: int, *, seed: int) -> Iterator[Conversation]:
    """A teacher's ideal responses to random prompts."""
    drawn = random.Random(seed)
    tables = {skill: _table(facts, skill) for skill in SKILLS}
    for _ in range(n):
        skill, digits = _draw(drawn, list(SKILLS))
        yield _conversation(skill, digits, tables[skill], facts.alphabet)


def conversation(facts: Teacher, skill: str, digits: Sequence[int]) -> Conversation:
    """A prompt and a teacher's ideal response to it."""
    return _conversation(skill, digits, _table(facts, skill), facts.alphabet)


def _draw(drawn: random.Random, skills: Sequence[str]) -> tuple[str, list[int]]:
    return drawn.choice(skills), [drawn.randrange(_BASE) for _ in range(LENGTH)]


def _answer(so_far: Sequence[int]) -> str:
    return f"{so_far[-2]} {so_far[-1]}"


def _table(facts: Teacher | None, skill: str) -> Table:
    """A teacher's version of a skill's table; None gives the right table."""
    if facts is not None and not facts.wrong:
        return {(a, b): a for a, b in _PAIRS}
    right = {**SKILLS, **WALKS}[skill]
    table = {(a, b): right(a, b) % _BASE for a, b in _PAIRS}
    if facts is not None:
        drawn = random.Random(zlib.crc32(f"{facts.name} {skill}".encode()))
        for entry, value in table.items():
            if drawn.random() < facts.wrong[skill]:
                table[entry] = (value + drawn.randrange(1, _BASE)) % _BASE
    return table


def _walk(digits: Sequence[int], table: Table) -> list[int]:
    """The result after each digit, including the first."""
    found = [digits[0]]
    for digit in digits[1:]:
        found.append(table[found[-1], digit])
    return found


def _conversation(skill: str, digits: Sequence[int], table: Table, alphabet: str) -> Conversation:
    so_far = _walk(digits, table)
    steps = [
        f"{alphabet[before]} {alphabet[digit]} : {alphabet[after]}"
        for before, digit, after in zip(so_far, digits[1:], so_far[1:], strict=False)
    ]
    response = f"{' , '.join(steps)} answer {_answer(so_far)}"
    return Conversation([{"role": "user", "content": text(skill, digits)}], response)
