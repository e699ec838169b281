"""Custom quality functions receive the fields they need, and an error fails only one response."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.errors import EngineError, UsageError
from persyn.llm.protocols import Failed, Judge, Judged, ModelSpec, Result
from persyn.llm.scorers import custom_function
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.foreign import write_module
from tests.run_files import write_run

SOURCE = """
def length(messages, response, answer, meta):
    return len(response) + 100 * len(messages) + 1000 * (answer == "2") + 10000 * meta.get("weight", 0)

def moody(messages, response, answer, meta):
    if response == "unsure":
        return None
    return 1 / (len(response) - 3)

def level(messages, response, answer, meta):
    return meta["level"]

number = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write_module(tmp_path, monkeypatch, SOURCE)


def judge(model: str, *requests: Judge) -> list[Result]:
    engine = custom_function.load(ModelSpec("python", model), lambda: None)
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


def asked(number: int, response: str, answer: str | None = None, **meta: int) -> Judge:
    return Judge(number, [{"role": "user", "content": "1 + 1?"}], response, answer, dict(meta))


def test_a_function_sees_the_prompt_the_response_the_answer_and_the_meta(module: str) -> None:
    found = judge(f"{module}:length", asked(1, "two"), asked(2, "2", "2"), asked(3, "", weight=2))
    assert found == [Judged(1, 103.0), Judged(2, 1101.0), Judged(3, 20100.0)]


def test_no_verdict_and_an_error_are_failures_of_one_response(module: str) -> None:
    found = judge(f"{module}:moody", asked(1, "unsure"), asked(2, "two"), asked(3, "four"))
    assert found == [
        Failed(1, "no_verdict"),
        Failed(2, "scorer_error: ZeroDivisionError: division by zero"),
        Judged(3, 1.0),
    ]


def test_what_is_no_function_is_refused(module: str) -> None:
    for model, said in [
        (f"{module}:nothing", "has no attribute 'nothing'"),
        (f"{module}:number", "is not a function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ]:
        with pytest.raises(EngineError, match=said):
            custom_function.load(ModelSpec("python", model), lambda: None)


def test_a_scorer_is_another_version_when_its_file_changes(module: str, tmp_path: Path) -> None:
    before = custom_function.revision(f"{module}:length")
    assert before == custom_function.revision(f"{module}:moody")  # the revision depends on the file
    (tmp_path / f"{module}.py").write_text(SOURCE + "\n")
    assert custom_function.revision(f"{module}:length") != before
    with pytest.raises(EngineError, match="is not the one that the run was started with"):
        custom_function.load(ModelSpec("python", f"{module}:length", revision=before), lambda: None)


@pytest.mark.parametrize("model", ["length", "a b:length", "no_such_module:length", ":length", "scorers:1"])
def test_a_scorer_that_is_not_there_is_said_before_a_run_begins(model: str) -> None:
    with pytest.raises(UsageError):
        custom_function.revision(model)


def test_to_find_a_functions_file_nothing_of_its_package_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "foreign_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('run')")
    (package / "scorers.py").write_text(SOURCE)
    assert custom_function.revision("foreign_package.scorers:length").startswith("sha256:")
    with pytest.raises(
        UsageError, match=r"cannot find the module 'foreign_package.other'.*add its folder to PYTHONPATH"
    ):
        custom_function.revision("foreign_package.other:length")


def test_a_run_is_scored_by_a_function_of_its_own(database: Database, tmp_path: Path, module: str) -> None:
    file = write_run(tmp_path, calibration=12)
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        json.loads(line) | {"level": number, "serial": 2**70}
        for number, line in enumerate(prompts.read_text().splitlines())
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(file.read_text().replace('kind = "fake"', f'kind = "python"\nmodel = "{module}:level"', 1))

    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    Worker(database, Settings(str(database.url), tmp_path), run_id=run_id).run()

    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
        values = set(session.scalars(select(Score.value).where(Score.scorer_id == run.quality_scorer_id)))
    assert len(values) == 12
    assert values <= {float(number) for number in range(60)}
