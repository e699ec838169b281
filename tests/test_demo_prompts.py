from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from demo import prompts
from persyn.llm.scorers import math_answer
from persyn.runs import run_file


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    return prompts.make(seed=0)


def test_every_group_has_as_many_prompts_and_none_is_there_twice(records: list[dict[str, str]]) -> None:
    assert Counter(record["group"] for record in records) == dict.fromkeys(prompts.GROUPS, prompts.PER_GROUP)
    assert len({record["prompt"] for record in records}) == len(records) == 240
    assert len({record["id"] for record in records}) == len(records)


def test_a_seed_says_what_the_file_is(tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        assert prompts.write(tmp_path / name, seed) == 240

    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_answer_is_what_the_question_asks_for(records: list[dict[str, str]]) -> None:
    for record in records:
        if record["group"] == "numeral":
            continue
        numbers = [int(number) for number in re.findall(r"\d+", record["prompt"])]
        expected = {
            "sum": numbers[0] + numbers[1],
            "story": numbers[0] + numbers[1],
            "cost": numbers[0] * numbers[-1],
            "first": numbers[0],
            "last": numbers[-1],
        }
        assert int(record["answer"]) == expected[record["group"]], record


@pytest.mark.parametrize(
    ("number", "words"),
    [(7, "seven"), (12, "twelve"), (13, "thirteen"), (19, "nineteen"), (40, "forty"), (99, "ninety-nine")],
)
def test_numbers_are_spelled(number: int, words: str) -> None:
    assert prompts.spell(number) == words


def test_no_worked_example_is_asked() -> None:
    examples = prompts.worked_examples()

    assert "Write sixty in digits." in examples
    for seed in range(3):
        assert examples.isdisjoint(record["prompt"] for record in prompts.make(seed))


def test_groups_do_not_come_one_after_the_other(records: list[dict[str, str]]) -> None:
    assert len({record["group"] for record in records[:24]}) == len(prompts.GROUPS)


def test_repeating_the_question_is_no_answer(records: list[dict[str, str]]) -> None:
    answers = {r["id"]: math_answer.find(r["prompt"].rstrip("?.")) for r in records if r["group"] != "last"}

    # Two numbers may be equal by chance: 40 and the sum of 40 and 0.
    assert [r["id"] for r in records if answers.get(r["id"]) == r["answer"]] == []


def test_the_run_file_is_a_valid_one_whose_teachers_are_right_in_their_examples() -> None:
    run = run_file.read(prompts.RUN_FILE)

    assert run.run.calibration < prompts.PER_GROUP * len(prompts.GROUPS)
    assert round(run.run.calibration * run_file.holdout(run)) >= 24
    for teacher in run.teachers:
        for shot in teacher.few_shot:
            assert math_answer.find(shot.assistant).strip() == _expected(shot.user), shot


def _expected(question: str) -> str:
    """The required end of a worked example, computed from the numbers in its question."""
    words = {"ten": "10", "twenty-one": "21", "sixty": "60", "thirty-five": "35"}
    words |= {"one hundred": "100", "eighty-eight": "88"}
    if question.startswith("Write "):
        return words[question.removeprefix("Write ").removesuffix(" in digits.")]
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if "the first" in question:
        return str(numbers[0])
    if "the last" in question:
        return str(numbers[-1])
    return str(numbers[0] * numbers[1] if "cost" in question else sum(numbers))
