"""A small world of known truth: five skills, teachers that have some of them, and a student that has none.

A prompt names a skill and five digits below seven; a skill is a table of 7 x 7 of them, and a response works through
the digits from the left, one look into the table at a time. What a teacher believes of each table, and whether it
writes digits or letters, is all that it is; `skill_models` trains a model of two layers to be it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Each is a function of what came out so far and the next digit, modulo 7.
SKILLS = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "twice": lambda a, b: 2 * a + b,
    "thrice": lambda a, b: a + 3 * b,
    "fourth": lambda a, b: 4 * a + b + 1,
}
#: What every model has learned before anything else: to walk through digits, without any of the skills.
WALKS = {"first": lambda a, b: a, "max": max}
DIGITS, LETTERS = "0123456", "abcdefg"
#: Digits in a prompt.
LENGTH = 5

Turns: TypeAlias = tuple[list[dict[str, str]], str]
"""A prompt's turns, and a response."""

Table: TypeAlias = dict[tuple[int, int], int]
_BASE = len(DIGITS)
_PAIRS = [(a, b) for a in range(_BASE) for b in range(_BASE)]


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a teacher is."""

    name: str
    #: It is said to have so many parameters, billions; strategies that go by strength go by it.
    params_b: float
    #: How likely each entry of a skill's table is wrong in its belief, by skill; an answer takes four entries.
    wrong: dict[str, float]
    #: What it writes its working in; the answer is always in digits.
    alphabet: str = DIGITS


def _all(wrong: float, **but: float) -> dict[str, float]:
    return {skill: but.get(skill, wrong) for skill in SKILLS}


#: The largest knows everything and writes what the student has never seen; `echo` writes what the student finds
#: likeliest, and knows nothing; two are right about two skills each, and the others about all, more or less.
TEACHERS = (
    Teacher("large", 32.0, _all(0.0), alphabet=LETTERS),
    Teacher("medium", 7.0, _all(0.09)),
    Teacher("small", 1.0, _all(0.18)),
    Teacher("adder", 3.0, _all(0.45, plus=0.0, minus=0.0)),
    Teacher("doubler", 3.0, _all(0.45, twice=0.0, thrice=0.0)),
    Teacher("echo", 2.0, {}),
)


def prompts(n: int, *, seed: int) -> list[tuple[str, list[int]]]:
    """Skills and digits, no two the same."""
    drawn = random.Random(seed)
    found: dict[tuple[str, ...], tuple[str, list[int]]] = {}
    while len(found) < n:
        skill, digits = _draw(drawn, list(SKILLS))
        found[(skill, *map(str, digits))] = skill, digits
    return list(found.values())


def text(skill: str, digits: Sequence[int]) -> str:
    """The prompt."""
    return f"{skill} {' '.join(map(str, digits))}"


def answer(skill: str, digits: Sequence[int]) -> str:
    """The right one: what comes out after the last digit but one, and after the last; luck hits one of 49."""
    return _answer(_walk(digits, _table(None, skill)))


def is_right(messages: Any, response: str, answer: str, meta: Any) -> float:
    """The study's quality: 1 for the right answer, whatever the working."""
    return float(response.partition("answer ")[2] == answer)


def walking(n: int, *, seed: int) -> Iterator[Turns]:
    """What the student has learned before anything else."""
    drawn = random.Random(seed)
    for _ in range(n):
        skill, digits = _draw(drawn, list(WALKS))
        yield _conversation(skill, digits, _table(None, skill), DIGITS)


def responses(facts: Teacher, n: int, *, seed: int) -> Iterator[Turns]:
    """What a teacher should say, to prompts drawn by lot."""
    drawn = random.Random(seed)
    tables = {skill: _table(facts, skill) for skill in SKILLS}
    for _ in range(n):
        skill, digits = _draw(drawn, list(SKILLS))
        yield _conversation(skill, digits, tables[skill], facts.alphabet)


def conversation(facts: Teacher, skill: str, digits: Sequence[int]) -> Turns:
    """A prompt, and what a teacher should say to it."""
    return _conversation(skill, digits, _table(facts, skill), facts.alphabet)


def _draw(drawn: random.Random, skills: Sequence[str]) -> tuple[str, list[int]]:
    return drawn.choice(skills), [drawn.randrange(_BASE) for _ in range(LENGTH)]


def _answer(so_far: Sequence[int]) -> str:
    return f"{so_far[-2]} {so_far[-1]}"


def _table(facts: Teacher | None, skill: str) -> Table:
    """What a teacher believes of a skill; None knows it."""
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
    """What comes out after each digit, the first one included."""
    found = [digits[0]]
    for digit in digits[1:]:
        found.append(table[found[-1], digit])
    return found


def _conversation(skill: str, digits: Sequence[int], table: Table, alphabet: str) -> Turns:
    so_far = _walk(digits, table)
    steps = [
        f"{alphabet[before]} {alphabet[digit]} : {alphabet[after]}"
        for before, digit, after in zip(so_far, digits[1:], so_far[1:], strict=False)
    ]
    return [{"role": "user", "content": text(skill, digits)}], f"{' , '.join(steps)} answer {_answer(so_far)}"
