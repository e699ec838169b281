"""Responses are scored by running their prompts' tests against their code."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Result
from persyn.llm.sandbox import box
from persyn.llm.scorers import code, code_tests
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.run_files import write_run

missing = box.missing_walls(256)
pytestmark = pytest.mark.skipif(bool(missing), reason=f"this host lacks walls: {missing}")
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
WRONG = "```python\ndef add(a, b):\n    return a * b\n```"
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 1) == 1"]}


def judge(*cases: tuple[str, dict[str, Any]], **options: object) -> list[Result]:
    """The results of responses, each with the fields of its prompt's row."""
    engine: Engine = code.load(ModelSpec("code", "", options=options), lambda: None)
    engine.submit([Judge(n, [], response, meta=meta) for n, (response, meta) in enumerate(cases)])
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    return [found[n] for n in range(len(cases))]


def test_all_tests_or_their_share_and_the_first_failures_with_their_reasons() -> None:
    share, none_of_them = judge((WRONG, MBPP), ("```python\n1 / 0\n```", MBPP), level="test")
    (verdict,) = judge((WRONG, MBPP))

    assert isinstance(share, Judged)
    assert share.value == pytest.approx(1 / 3)
    failed = [{"test": test, "reason": "AssertionError"} for test in (MBPP["test_list"][0], MBPP["test_list"][2])]
    assert share.detail == {"tests": 3, "passed": 1, "failed": failed}
    assert isinstance(none_of_them, Judged)
    assert none_of_them.value == 0
    assert "ZeroDivisionError" in none_of_them.detail["failed"][0]["reason"]
    assert isinstance(verdict, Judged)
    assert (verdict.value, verdict.detail["passed"]) == (0, 0)


@pytest.mark.parametrize(
    ("meta", "response"),
    [
        (MBPP, ADD),
        ({"tests": MBPP["test_list"]}, ADD),
        (
            {
                "test_list": ["assert area(Box(2, 3)) == six"],
                "test_setup_code": "six = 6",
                "test_imports": ["import re"],
            },
            "```python\nclass Box:\n    def __init__(self, a, b): self.a, self.b = a, b\n\n"
            "def area(box): return box.a * box.b\n```",
        ),
        (
            {"test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3", "entry_point": "add"},
            ADD,
        ),
        ({"test": "from solution import add\n\ndef test_one():\n    assert add(1, 2) == 3"}, ADD),
        ({"input_output": {"inputs": ["1 2\n", ["3 4", ""]], "outputs": ["3\n", ["7"]]}}, "sum"),
        ({"input_output": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}, "sum"),
        ({"tests": [{"input": "1 2", "output": "3 \n\n"}]}, "sum"),
        ({"input_output": {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [[1, 2]]]}}, ADD),
        (
            {"input_output": {"fn_name": "pairs", "inputs": [[1, 2]], "outputs": [{"all": [[1, [2]], [2, [1]]]}]}},
            "```python\ndef pairs(a, b): return {'all': ((a, [b]), [b, (a,)])}\n```",
        ),
        (
            {
                "input_output": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
                "starter_code": "class Solution:\n    def add(self, a, b):",
            },
            "```python\nclass Solution:\n    def add(self, a, b): return a + b\n```",
        ),
    ],
)
def test_the_fields_of_public_datasets_are_understood(meta: dict[str, Any], response: str) -> None:
    right = "```python\nprint(sum(map(int, input().split())))\n```" if response == "sum" else response
    good, bad = judge((right, meta), ("```python\nprint(5)\n```", meta))
    assert isinstance(good, Judged), good
    assert (good.value, good.detail["failed"]) == (1, [])
    assert isinstance(bad, Judged), bad
    assert bad.value == 0


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({}, "no_tests: "),
        ({"tests": []}, "no_tests: "),
        (
            {"tests": ["assert add(1)"], "test": "assert add(1)"},
            "malformed_tests: the prompt's row has both tests and test",
        ),
        ({"tests": 5}, "malformed_tests: "),
        ({"tests": [" "]}, "malformed_tests: a test is empty"),
        ({"tests": ["assert add(1)", {"input": "", "output": ""}]}, "malformed_tests: tests has both"),
        ({"input_output": "{"}, "malformed_tests: "),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "malformed_tests: input_output has 1 inputs and 0"),
        ({"input_output": {"inputs": [1], "outputs": ["1"]}}, "malformed_tests: Expected `str | array`"),
        ({"input_output": {"fn_name": "f(); x", "inputs": [[1]], "outputs": [1]}}, "malformed_tests: fn_name"),
    ],
)
def test_a_row_without_tests_that_can_be_run_is_recognised(meta: dict[str, Any], reason: str) -> None:
    assert (code_tests.flaw(meta) or "").startswith(reason)


def test_tests_that_cannot_be_run_fail_and_are_not_called_wrong() -> None:
    found = judge((ADD, {"tests": ["import numpy\nassert add(1, 2) == 3"]}), (ADD, {}))
    assert found[0] == Failed(0, "unsupported_tests: the tests import numpy, which is not in the standard library")
    assert isinstance(found[1], Failed)


HUMAN_EVAL = """import math

def shifted(text: str) -> str:
    return "".join(chr(ord(each) + 1) for each in text)

print("not a definition")

def unshifted(text: str):
    \"\"\"Takes what shifted made, and returns the text.\"\"\"
"""


@pytest.mark.parametrize("prompt", [HUMAN_EVAL, f"Complete this:\n```python\n{HUMAN_EVAL}```\n"])
def test_helpers_that_only_the_prompt_defines_are_there_for_tests_and_code(prompt: str) -> None:
    meta = {"test": "def check(f):\n    assert f(shifted('abc')) == 'abc'", "entry_point": "unshifted"}
    engine: Engine = code.load(ModelSpec("code", "", options={}), lambda: None)
    right = "def unshifted(text):\n    return ''.join(chr(ord(each) - int(math.sqrt(1))) for each in text)"
    cheat = "def shifted(text): return text\ndef unshifted(text): return text"
    asked = [{"role": "user", "content": prompt}]
    engine.submit([Judge(n, asked, response, meta=meta) for n, response in enumerate((right, cheat))])
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    assert [(type(found[n]), getattr(found[n], "value", found[n])) for n in range(2)] == [(Judged, 1.0), (Judged, 0.0)]


#: Begins with all that a prompt may begin with; `numpy` is not in the sandbox, and only a wrong response uses it.
BEGINNING = """from __future__ import annotations
import numpy as np, math
LIMIT: int = 10
try:
    from math import gcd
except ImportError:
    from fractions import gcd
if __name__ == "__main__":
    raise SystemExit

def half(x):
    return x / 2

def f(x):
    ...
"""


def test_a_prompt_s_beginning_is_there_whatever_its_statements_are_and_a_missing_module_only_where_it_is_used() -> None:
    check = "def check(f):\n    assert f(6) == gcd(LIMIT, 6) + half(2)"
    meta = {"test": check, "entry_point": "f", "test_setup_code": "from __future__ import annotations"}
    lacking = {"test": "def check(f):\n    assert f(6) == np.int64(3) == half(6)", "entry_point": "f"}
    right, wrong = "def f(x): return gcd(LIMIT, math.floor(x)) + 1", "def f(x): return np.gcd(LIMIT, x) + 1"
    engine: Engine = code.load(ModelSpec("code", "", options={}), lambda: None)
    asked = [{"role": "user", "content": BEGINNING}]
    cases = ((right, meta), (wrong, meta), (right, lacking))
    engine.submit([Judge(n, asked, response, meta=fields) for n, (response, fields) in enumerate(cases)])
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    assert [getattr(found[n], "value", found[n]) for n in range(3)] == [
        1.0,
        0.0,
        Failed(2, "unsupported_tests: the tests import numpy, which is not in the standard library"),
    ]


@pytest.mark.parametrize("setup", ["return", "nonlocal x"])
def test_tests_that_cannot_be_compiled_are_unreadable(setup: str) -> None:
    (found,) = judge((ADD, MBPP | {"test_setup_code": setup}))
    assert isinstance(found, Failed)
    assert found.reason.startswith("unreadable_tests: SyntaxError")


@pytest.mark.parametrize(
    "prompt",
    ["Write unshifted.", "def other(): pass", "def unshifted(:", "", f"x = {'-' * 5_000}1\ndef unshifted(): ..."],
    ids=range(5),
)
def test_a_prompt_that_is_no_program_defines_nothing(prompt: str) -> None:
    assert code_tests.preamble_of(prompt, "unshifted") == ""


def test_a_script_has_a_time_for_all_its_tests() -> None:
    slow = "```python\nimport time\ntime.sleep(float(input()))\n```"
    meta = {"tests": [{"input": seconds, "output": ""} for seconds in ("0", "30", "0")]}
    (found,) = judge((slow, meta), level="test", timeout_seconds=30, total_seconds=2)
    assert isinstance(found, Judged)
    assert found.value == pytest.approx(1 / 3)
    assert [each["reason"] for each in found.detail["failed"]] == [box.LATE, box.OVER]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("def f(): pass", "def f(): pass"),
        ("```python\na\n```\nand\n```python\nb\n```", "b\n"),
        ("```py\na\n```\n```bash\nb\n```\n```\nc\n```", "a\n"),
        ("```\na\n```\nor\n```\nb\n```\n```text\nc\n```", "b\n"),
        ("```bash\na\n```", None),
        ("~~~Python3 title=x\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("1. so:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("```python\nunfinished", "unfinished"),
    ],
)
def test_the_code_is_the_last_block_of_python(response: str, expected: str | None) -> None:
    assert code_tests.code_of(response) == expected


def test_a_hostile_response_is_searched_for_code_in_linear_time() -> None:
    began = time.monotonic()
    for response in ("`" * 300_000, "```" + "\t" * 300_000, "```\n" * 100_000, ("```\n" + " " * 1000) * 300):
        code_tests.code_of(response)
    assert time.monotonic() - began < 10


def test_a_response_without_code_is_wrong() -> None:
    (no_code,) = judge(("```bash\nls\n```", MBPP))
    assert no_code == Judged(0, 0.0, detail={"failed": [{"reason": "the response has no block of Python code"}]})


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_run_is_scored_by_the_tests_of_its_prompts(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, prompts=8, teachers=("ada", "bob"), strategy="static", calibration=4)
    prompts = tmp_path / "prompts.jsonl"
    # The fake teachers write words, which are no code.
    rows = [json.loads(line) | {"tests": ["assert add(1) == 2"]} for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(file.read_text().replace('kind = "fake"', 'kind = "code"', 1))

    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    Worker(database, Settings(str(database.url), tmp_path), run_id=run_id).run()

    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
        scores = session.scalars(select(Score).where(Score.scorer_id == run.quality_scorer_id)).all()
        assert [score.value for score in scores] == [0.0] * 8
        assert all("the code cannot be loaded" in score.detail["failed"][0]["reason"] for score in scores)
