"""The controlled study's world matches its description, and studies of external data run."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persyn.db.grid import Grid
from persyn.errors import UsageError
from persyn.method.intervals import Interval
from persyn.method.rewards import Matrix
from persyn.method.strategies import StrategyInputs
from persyn.student.outcomes import StudentFacts
from studies import committee, controlled, frontier, many_domains, pilot, samples, skills, subjects, tasks
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


def test_the_pilot_s_specialists_have_one_of_its_skills_each() -> None:
    first, second = (pilot._drawn(60, seed) for seed in (0, 1))

    knows = [
        {skill: all(_is_right(name, *prompt) for prompt in first if prompt[0] == skill) for skill in pilot.SKILLS}
        for name in ("adder", "doubler")
    ]

    assert knows == [{"plus": True, "twice": False}, {"plus": False, "twice": True}]
    assert len(set(map(str, first + second))) > 110  # each seed has its own


def _is_right(name: str, skill: str, digits: list[int]) -> bool:
    return bool(skills.is_right([], response(teacher(name), skill, digits), skills.answer(skill, digits), {}))


def test_tables_take_the_place_of_a_page_s_earlier_ones(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Said.\n\n<!-- tables: begin -->old<!-- tables: end -->\n\nMore.\n")

    for _ in range(2):
        put(page, table(("a", "b"), [("1", "2")]))

    assert page.read_text() == (
        "Said.\n\n<!-- tables: begin -->\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<!-- tables: end -->\n\nMore.\n"
    )


def page(folder: Path, made: str = "") -> Path:
    """A page without tables, or with the given ones."""
    path = folder / "page.md"
    path.write_text(f"Said.\n\n<!-- tables: begin -->\n\n{made}<!-- tables: end -->\n")
    return path


def write_grid(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def study(module: str, *arguments: str | Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PERSYN_")}
    command = [sys.executable, "-m", f"studies.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.model
def test_a_grid_is_studied_and_other_tables_of_the_page_stay(tmp_path: Path, tiny: Path) -> None:
    names = ("ada", "bob", "cyd")
    rows = [
        {
            "prompt": f"What is {n} plus {n}?",
            "teacher": name,
            "response": f"{name} says {2 * n}.",
            # Each of the first two is right on every other prompt, the third on every third.
            "label": n % 2 == place if place < 2 else n % 3 == 0,
            "meta": {"second": n % 2 == place if place < 2 else n % 3 == 0},
        }
        for n in range(40)
        for place, name in enumerate(names)
    ]
    rows[0]["meta"]["second"] = not rows[0]["label"]
    teachers = "".join(
        f'[[teachers]]\nname = "{name}"\nfamily = "{name}"\nparams_b = {size}\n' for size, name in enumerate(names, 1)
    )
    (tmp_path / "teachers.toml").write_text(teachers)
    report = page(tmp_path, "### another, student\n\nOf another grid.\n\n")
    grid = write_grid(tmp_path / "made_parallel.jsonl.gz", rows)
    known = ("--teachers", tmp_path / "teachers.toml", "--student", f"tiny={tiny}=bob", "--backbone", tiny)
    size = ("--prompts", "30", "--calibration", "20", "--seeds", "1", "--alphas", "0", "--second-label", "second")

    study("real_grids", grid, *known, *size, "--home", tmp_path / "home", "--report", report)

    made = tables(report)
    assert made.startswith("### another, student\n\nOf another grid.\n\n### made, tiny\n\n")
    assert "20 calibration prompts, 10 hold-out prompts, 3 teachers, 1 seeds." in made
    strategies = {line.split(" | ")[0].removeprefix("| ") for line in made.splitlines() if line.startswith("| ")}
    assert {"oracle", "static", "strong", "family-strong", "mix", "car", "random", "head", "neighbours"} <= strategies
    assert "| oracle | 1.000 |" in made  # for quality alone: one of the first two is always right


def test_kinds_of_routers_are_compared_and_a_finished_fit_is_not_repeated(tmp_path: Path) -> None:
    # Of each pair of prompts, one teacher is right about sums and the other about poems.
    rows = [
        {"prompt": f"{('sum', 'poem')[n % 2]} {n}", "domain": "ab"[n % 2], "scores": {"ada": n % 2 == 0, "bob": n % 2}}
        for n in range(80)
    ]
    rows[0]["scores"] = {"ada": 0.5}
    grid = write_grid(tmp_path / "made.jsonl.gz", rows)
    report = page(tmp_path, "")
    arguments = (
        grid,
        "--field",
        "domain",
        "--sizes",
        "40",
        "--seeds",
        "0",
        "1",
        "--home",
        tmp_path,
        "--report",
        report,
    )

    study("router_kinds", *arguments)
    made, kept = tables(report), (tmp_path / "outcomes.jsonl").read_text()
    study("router_kinds", *arguments)

    assert "### made, reading the prompt\n" in made
    assert "### made, reading the prompt and domain\n" in made
    # Only the label is read by clusters; all of the gap is closed.
    assert any(line.startswith("| clusters |") and "(+100.0% +- 0.0%)" in line for line in made.splitlines())
    assert tables(report) == made
    assert (tmp_path / "outcomes.jsonl").read_text() == kept


def test_the_checker_is_held_against_other_judges(tmp_path: Path) -> None:
    cases = [{"gold": "2", "pred": pred, "expected": expected} for pred, expected in (("2.0", 1), ("3", 0), ("3", 1))]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    rows = [
        {"response": "So it is \\boxed{4}.", "reference_answer": "4", "label": True, "meta": {}},
        # The other judge called another answer in the text right.
        {
            "response": "It is 4, or \\boxed{5}.",
            "reference_answer": 4,
            "label": True,
            "meta": {"extracted_answer": "4"},
        },
        {"response": "\\boxed{4}", "reference_answer": "4", "label": False, "meta": {"extracted_answer": "4"}},
        {"response": "\\boxed{4}", "reference_answer": "4", "label": False, "meta": {"second": True}},
    ]
    grid, report = write_grid(tmp_path / "grid.jsonl.gz", rows), page(tmp_path)

    arguments = ("--cases", tmp_path / "cases.jsonl", "--second-label", "second", "--list", tmp_path / "apart.jsonl")
    study("answers", grid, *arguments, "--report", report)

    assert "| cases | 3 | 2 | 1 | 0 | 0 | 0 |" in tables(report)
    assert "| grid | 3 | 1 | 1 | 1 | 0 | 1 |" in tables(report)
    apart = [json.loads(line) for line in (tmp_path / "apart.jsonl").read_text().splitlines()]
    assert [(each["of"], each["how"], each.get("another_answer")) for each in apart] == [
        ("cases", "called_wrong", None),
        ("grid", "called_wrong", True),
        ("grid", "called_right", False),
    ]


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
    assert "* Its learning rate and epochs were chosen on the first seed." in page


def test_of_students_that_were_trained_in_two_ways_the_better_is_not_picked() -> None:
    two = [became(0.9), became(0.5, training="full, 8 epochs"), became(0.1, training=None)]

    with pytest.raises(UsageError, match="were trained or asked in 2 ways; give another --home"):
        controlled._became(dict.fromkeys(controlled.CASES, two), {})


def test_the_best_of_four_real_samples_is_counted_by_hand() -> None:
    cells = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [np.nan, 0, 0, 1]])
    quality = cells[:, None, :]

    # 6 of 16 are right, and so is one of four for 3 of 4 prompts: 1 - (10/16)^4 = 0.847 if chance alone decided.
    assert "| a | 37.5% | 75.0% | 84.7% | 2.50 |" in samples.real_best(["a"], quality, 4)
    # The variances of the cells are 1/4, 0, 0 and 1/3.
    assert f"| 1 | {np.sqrt((1 / 4 + 1 / 3) / 4):.3f} | unknown |" in samples.real_cells(quality, (1, 2))


def test_four_samples_halve_the_distance_of_a_cell_from_the_truth() -> None:
    page = tables(Path(samples.__file__).with_suffix(".md"))
    made = samples.cells((1, 4))

    (_, one, _), (_, four, said) = (line.strip("| ").split(" | ") for line in made.splitlines()[2:4])
    assert float(four) == pytest.approx(float(one) / 2, rel=0.02)
    assert float(said) == pytest.approx(float(four), rel=0.05)
    assert all(line in page for line in made.splitlines()[2:4])
    assert all(line in page for line in samples.kept((1, 2, 4, 8)).splitlines())


def of_two_subjects(n: int, quality: Matrix) -> subjects.Pool:
    """A pool of n prompts of two subjects in turn; learnability is equal, and the backbone knows nothing."""
    zeros = np.zeros(quality.shape)
    cells = Grid(
        prompt_ids=np.arange(n),
        is_holdout=np.zeros(n, dtype=np.bool_),
        teacher_ids=np.arange(quality.shape[1]),
        quality=quality,
        learnability=zeros,
        quality_errors=zeros,
        learnability_errors=zeros,
        prompt_tokens=zeros,
        response_tokens=np.full(quality.shape, 5.0),
        n_responses=np.ones(quality.shape, dtype=np.int64),
        alpha=0.4,
        how="minmax",
    )
    return subjects.Pool(cells, np.ones((n, 2)), ["law", "math"] * (n // 2), ["ada", "bob"])


def test_a_router_that_reads_the_subject_gains_where_who_leads_depends_on_it() -> None:
    # Ada is right about all of law, bob about all of math and about every tenth prompt of law.
    law, math = np.arange(100) % 2 == 0, np.arange(100) % 2 == 1
    quality = np.column_stack([law, math | (np.arange(100) % 10 == 0)]).astype(np.float64)

    found = subjects.measure(of_two_subjects(100, quality), 0.0, range(1))

    assert found["oracle"].shape == (1, 100)
    assert found["clusters: subject"].mean() == found["oracle"].mean()  # 0 on prompts that both are right about
    assert found["clusters: prompt"].mean() == found["static"].mean() == pytest.approx(0.5)
    rows = [line.strip("| ").split(" | ") for line in subjects.gains(found).splitlines()]
    assert next(row for row in rows if row[0] == "clusters: subject")[5] == "+100%"


@pytest.mark.parametrize(
    ("task", "response", "right"),
    [
        ({"answer": "12"}, "5 + 7 = 12", 1.0),
        ({"answer": "12"}, "12 - 5 = 7", 0.0),
        ({"answer": "12"}, "", 0.0),
        ({"answer": "saw", "among": ["saw", "pink", "goat"]}, "A Saw is a tool.", 1.0),
        ({"answer": "saw", "among": ["saw", "pink", "goat"]}, "A saw or a goat.", 0.0),
        ({"answer": None, "instruction": "startend:quotation", "kwargs": {}}, '"The sea."', 1.0),
        ({"answer": None, "instruction": "startend:quotation", "kwargs": {}}, "The sea.", 0.0),
        ({"answer": None, "tests": ["assert f(3) == 5", "assert f(6) == 6"]}, "def f(x): return max(x, 5)", 1.0),
        ({"answer": None, "tests": ["assert f(3) == 5", "assert f(6) == 6"]}, "def f(x): return 5", 0.0),
    ],
)
def test_a_task_is_right_or_wrong(task: dict[str, Any], response: str, right: float) -> None:
    assert tasks.is_right([], response, task["answer"], task) == right


def test_tasks_are_distinct_and_of_every_kind() -> None:
    drawn = tasks.draw(list(tasks.KINDS), 800, seed=0)

    assert len({task["prompt"] for task in drawn}) == 800
    assert Counter(task["kind"] for task in drawn) == dict.fromkeys(tasks.KINDS, 100)


def test_calibration_is_paid_from_the_same_tokens() -> None:
    # 40 prompts, two teachers, 5 tokens a response: a fold of 20 prompts has a budget of 100 tokens. Calibration takes
    # 50 of them, i.e. 5 prompts of both teachers, and 10 responses are left.
    quality = np.column_stack([np.arange(40) % 2 == 0, np.arange(40) % 2 == 1]).astype(np.float64)
    pool = of_two_subjects(40, quality)
    unknown = np.full(2, np.nan)
    inputs = StrategyInputs(quality, quality, quality, np.array([1.0, 2.0]), ["a", "b"], "a", "ab", unknown, unknown)
    world = many_domains.World(pool, inputs, quality, [""] * 40, {})

    found = many_domains._same_tokens(world, np.arange(20), np.arange(20, 40))

    assert {
        name: len(rows) for name, (rows, _) in found.items() if name in ("static", "PerSyn", "random", "strong")
    } == {
        "static": 10,
        "PerSyn": 10,
        "random": 20,
        "strong": 20,
    }


def test_verdicts_are_held_against_prompts_that_they_did_not_see(tmp_path: Path) -> None:
    # The first word of a prompt says who is right.
    rows = [
        {"prompt": f"{word} number {n}", "scores": {"ada": float(word == "sum"), "bob": float(word == "word")}}
        for n in range(120)
        for word in ("sum", "word")
    ]
    grid, report = write_grid(tmp_path / "made.jsonl.gz", rows), page(tmp_path)

    study("verdict", grid, "--resamplings", "4", "--sizes", "100", "--report", report)

    assert "| made | 100 | 100% | 0% | 0% | 0.0% | 0.0% | +0.5" in tables(report)


def test_a_frontier_is_compared_at_the_same_reward_and_at_the_same_cost() -> None:
    points = [frontier.Point(1.0, 0.5), frontier.Point(5.0, 0.7), frontier.Point(9.0, 0.9)]

    assert frontier._cost_of(points, 0.8) == pytest.approx(7.0)
    assert frontier._cost_of(points, 0.4) == 1.0
    assert np.isnan(frontier._cost_of(points, 0.95))
    assert frontier._reward_of(points, 3.0) == pytest.approx(0.6)


def test_less_money_buys_the_rewards_that_cost_least() -> None:
    # The small teacher, at a price of 1, is right on two of four prompts; the large one, at 10, on all.
    rewards = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    task = frontier.Task(rewards, rewards, np.array([1.0, 10.0]), rewards, rewards.mean(axis=0), np.array([0.2, 0.1]))

    found, others = frontier.frontier(task), dict(frontier.rivals(task))

    assert found[0][:2] == (1.0, 0.5)  # 0.5% of the way buys no response of the large one
    assert found[-1].reward == 1.0
    assert min(point.cost for point in found if point.reward == 1.0) < 10.0
    # By the means, the large teacher answers as many prompts, drawn by lot: each is worth half a right answer.
    n_large = (4 * found[-1].cost - 4) / 9
    assert found[-1].gain == pytest.approx(1.0 - (0.5 + n_large / 4 / 2))
    assert n_large < 4
    assert others["strong: the largest"][:2] == (10.0, 1.0)
    assert others["CAR: the best compatibility-adjusted reward"][:2] == (1.0, 0.5)
    assert others["mix, 50% to the largest"][:2] == (5.5, 0.75)
    # Two prompts are right at once; the other two are asked again.
    assert others["smallest first, then best on average, until right, 2 at most"][:2] == (1.0 + 0.5 * 10.0, 1.0)


def test_a_committee_gains_where_its_members_choices_differ_at_a_cost() -> None:
    # Together they prefer the second teacher (0.5 against 1), by which the first member loses 1, the second nothing.
    # They agree on the second prompt; on the third they disagree about equally good teachers.
    first = [[1.0, 0.0], [1.0, 0.0], [0.3, 0.3]]
    second = [[0.0, 2.0], [3.0, 0.0], [0.3, 0.3]]

    assert committee.of_votes(np.array([first, second])).tolist() == pytest.approx([0.5, 0.0, 0.0])
