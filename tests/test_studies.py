"""The small world of the controlled study is what its page says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from persyn.bootstrap import Interval
from persyn.errors import UsageError
from persyn.students import StudentFacts
from studies import controlled, skills
from studies.common import put, table, tables


def response(teacher: skills.Teacher, skill: str, digits: list[int]) -> str:
    return skills.conversation(teacher, skill, digits)[1]


def teacher(name: str) -> skills.Teacher:
    return next(each for each in skills.TEACHERS if each.name == name)


@pytest.mark.parametrize(
    ("skill", "right"),
    [
        ("plus", "3 4 : 0 , 0 6 : 6 , 6 1 : 0 , 0 2 : 2 answer 0 2"),
        ("minus", "3 4 : 6 , 6 6 : 0 , 0 1 : 6 , 6 2 : 4 answer 6 4"),
        ("twice", "3 4 : 3 , 3 6 : 5 , 5 1 : 4 , 4 2 : 3 answer 4 3"),
        ("thrice", "3 4 : 1 , 1 6 : 5 , 5 1 : 1 , 1 2 : 0 answer 1 0"),
        ("fourth", "3 4 : 3 , 3 6 : 5 , 5 1 : 1 , 1 2 : 0 answer 1 0"),
    ],
)
def test_who_knows_a_skill_works_through_the_digits_from_the_left(skill: str, right: str) -> None:
    knows_all = skills.Teacher("tester", 1.0, dict.fromkeys(skills.SKILLS, 0.0))

    assert response(knows_all, skill, [3, 4, 6, 1, 2]) == right
    assert skills.answer(skill, [3, 4, 6, 1, 2]) == right.partition("answer ")[2]


def test_the_largest_writes_letters_and_answers_in_digits() -> None:
    assert response(teacher("large"), "plus", [3, 4, 6, 1, 2]) == "d e : a , a g : g , g b : a , a c : c answer 0 2"


def test_the_echo_knows_the_form_and_nothing_else() -> None:
    assert response(teacher("echo"), "minus", [3, 4, 6, 1, 2]) == "3 4 : 3 , 3 6 : 3 , 3 1 : 3 , 3 2 : 3 answer 3 3"


def test_a_specialist_is_right_about_its_own_skills_alone() -> None:
    drawn = skills.prompts(500, seed=3)

    right = {
        skill: [
            skills.is_right([], response(teacher("adder"), skill, digits), skills.answer(skill, digits), {})
            for name, digits in drawn
            if name == skill
        ]
        for skill in skills.SKILLS
    }

    assert all(right["plus"])
    assert all(right["minus"])
    assert all(sum(right[skill]) < len(right[skill]) / 2 for skill in ("twice", "thrice", "fourth"))


def test_no_prompt_is_drawn_twice() -> None:
    drawn = [skills.text(*each) for each in skills.prompts(1_000, seed=0)]

    assert len(set(drawn)) == 1_000


def test_tables_take_the_place_of_a_page_s_earlier_ones(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Said.\n\n<!-- tables: begin -->old<!-- tables: end -->\n\nMore.\n")

    for _ in range(2):
        put(page, table(("a", "b"), [("1", "2")]))

    assert page.read_text() == (
        "Said.\n\n<!-- tables: begin -->\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<!-- tables: end -->\n\nMore.\n"
    )


def became(value: float, *, training: str | None = "full, 12 epochs") -> StudentFacts:
    interval = Interval(value, value, value)
    alpha, n = (None, 0) if training is None else (0.4, 5)
    return StudentFacts("student", "asked.jsonl", "python", "persyn", alpha, training, n, 300, 0, interval, None)


def test_the_page_has_the_rows_that_the_study_makes_and_marks_what_was_chosen_on_a_seed() -> None:
    facts = {case: [became(0.5), became(0.1, training=None)] for case in controlled.CASES}
    made = controlled._became(facts, {}) + controlled._order({case: [0.5] for case in controlled.CASES})

    def names(text: str) -> set[str]:
        rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
        return {name for name in rows if name in made}

    page = tables(controlled.REPORT)
    assert names(made) <= names(page)
    assert "PerSyn, tuned in full *" in names(page)
    assert "* Its rates were chosen on the first of them." in page


def test_of_students_that_were_trained_in_two_ways_the_better_is_not_picked() -> None:
    two = [became(0.9), became(0.5, training="full, 8 epochs"), became(0.1, training=None)]

    with pytest.raises(UsageError, match="were trained or asked in 2 ways; give another --home"):
        controlled._became(dict.fromkeys(controlled.CASES, two), {})
