"""Runs with custom strategies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from persyn.analysis import trace
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Assignment, RouterScore
from persyn.errors import UsageError
from persyn.ingest import responses
from persyn.ingest.response_rows import Layout
from persyn.llm.scorers import custom_function
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.foreign import write_module
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import PROMPTS, write_run
from tests.workers.test_strategies import chosen, count, grid, imported_run, work

#: The teachers ada, bob and cyd have 1, 2 and 3 billion parameters.
SOURCE = """
import sys
import time
from pathlib import Path

def by_level(prompts, known, shift=0):
    levels = [(prompt["meta"]["level"] + shift) % 3 for prompt in prompts]
    return [[10 * (t == level) + t for t in range(len(known.teachers))] for level in levels]

def worst(prompts, known):
    return [-known.sizes if all(known.sizes > 0) else [1, 2, 3] for _ in prompts]

def later(prompts, known, mark):
    if any(prompt["meta"]["level"] == 59 for prompt in prompts) and not Path(mark).exists():
        raise RuntimeError("not yet")
    return by_level(prompts, known)

def quits(prompts, known):
    if any(prompt["meta"]["level"] == 59 for prompt in prompts):
        sys.exit(3)
    return by_level(prompts, known)

def hangs(prompts, known):
    if any(prompt["meta"]["level"] == 59 for prompt in prompts):
        time.sleep(3600)
    return by_level(prompts, known)

def ranks(prompts, known):
    return [[0, 1, 2] for _ in prompts]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write_module(tmp_path, monkeypatch, SOURCE)


def write(folder: Path, model: str, *, options: str = "", **run: object) -> Path:
    """A run with the custom strategy; the prompts' metadata has a level from 0 to 59."""
    file = write_run(folder, strategy="python", **run)
    table = f'kind = "python"\nmodel = "{model}"\noptions = {{ {options} }}'
    file.write_text(file.read_text().replace('kind = "python"', table))
    prompts = folder / "prompts.jsonl"
    rows = [
        json.loads(line) | {"level": level, "serial": 2**70}
        for level, line in enumerate(prompts.read_text().splitlines())
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def start(database: Database, file: Path) -> int:
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def go_on(database: Database, folder: Path, run_id: int, **settings: float) -> tuple[RunState, str | None]:
    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, run_id), actor="me")
    Worker(database, Settings(str(database.url), folder, **settings), run_id=run_id).run()  # type: ignore[arg-type]
    with database.read() as session:
        run = session.get_one(Run, run_id)
        return run.state, run.error


def by_level(database: Database, run_id: int, *, reason: str) -> dict[int, tuple[int, float | None, float | None]]:
    """(teacher id, score, margin) of each prompt, by its level."""
    with database.read() as session:
        found = session.execute(
            select(Prompt.meta, Assignment.teacher_id, Assignment.score, Assignment.margin)
            .join(Assignment, Assignment.prompt_id == Prompt.id)
            .where(Assignment.run_id == run_id, Assignment.reason == reason)
        )
        return {meta["level"]: (teacher_id, score, margin) for meta, teacher_id, score, margin in found}


@SQLITE
def test_the_function_chooses_for_every_prompt_that_has_no_response_yet(
    database: Database, tmp_path: Path, module: str
) -> None:
    run_id = work(database, tmp_path, write(tmp_path, f"{module}:by_level", options="shift = 1"))

    asked = by_level(database, run_id, reason=f"python: {module}:by_level")
    assert (len(asked), len(by_level(database, run_id, reason="calibration"))) == (PROMPTS - 12, 12)
    with database.read() as session:
        ids = [teacher.id for teacher in lookup.teachers(session, run_id)]
    # The chosen teacher t scores 10 + t; the second best is cyd with 2, or bob with 1 if cyd is chosen.
    wanted = {0: (ids[0], 10.0, 8.0), 1: (ids[1], 11.0, 9.0), 2: (ids[2], 12.0, 11.0)}
    assert asked == {level: wanted[(level + 1) % 3] for level in asked}
    assert count(database, RouterScore) == 0


@POSTGRESQL
def test_who_traces_a_prompt_finds_the_functions_version(database: Database, tmp_path: Path, module: str) -> None:
    run_id = work(database, tmp_path, write(tmp_path, f"{module}:by_level"))
    with database.read() as session:
        run = session.get_one(Run, run_id)
        target = select(Assignment.prompt_id).where(Assignment.run_id == run_id, Assignment.job_id.is_not(None))
        found = trace.trace(session, run, session.scalars(target.limit(1)).one())
    assert found.strategy == {
        "model": f"{module}:by_level",
        "revision": custom_function.revision(f"{module}:by_level"),
        "options": {},
    }
    assert found.events  # of the job that asked it


@SQLITE
def test_another_run_of_it_chooses_the_same(database: Database, tmp_path: Path, module: str) -> None:
    model = f"{module}:by_level"
    first = work(database, tmp_path, write(tmp_path, model))
    again = work(database, tmp_path, write(tmp_path, model, name="again", job_prompts=1))
    assert chosen(database, first) == chosen(database, again)


@SQLITE
def test_what_was_assigned_stays_when_the_file_changes_and_the_rest_waits_for_it(
    database: Database, tmp_path: Path, module: str
) -> None:
    mark, source = tmp_path / "mark", tmp_path / f"{module}.py"
    run_id = start(database, write(tmp_path, f"{module}:later", options=f'mark = "{mark}"', job_prompts=1))

    state, error = go_on(database, tmp_path, run_id)
    assert state is RunState.FAILED
    assert f"{module}:later has no scores for prompt" in str(error)
    assert "strategy_error: RuntimeError: not yet (to use a changed function, start a run under another name" in str(
        error
    )
    first = by_level(database, run_id, reason=f"python: {module}:later")
    assert 40 <= len(first) < PROMPTS - 12

    mark.touch()
    source.write_text(SOURCE.replace("== level", "!= level"))
    state, error = go_on(database, tmp_path, run_id)
    assert state is RunState.FAILED
    assert "is not the one that the run was started with: restore it" in str(error)
    assert by_level(database, run_id, reason=f"python: {module}:later") == first

    source.write_text(SOURCE)
    assert go_on(database, tmp_path, run_id) == (RunState.DONE, None)
    assert first.items() <= by_level(database, run_id, reason=f"python: {module}:later").items()


@SQLITE
@pytest.mark.parametrize(("function", "said"), [("quits", "the engine exited with 3"), ("hangs", "was silent for")])
def test_a_function_that_ends_or_hangs_its_process_fails_the_run_and_no_more(
    database: Database, tmp_path: Path, module: str, function: str, said: str
) -> None:
    run_id = start(database, write(tmp_path, f"{module}:{function}"))
    state, error = go_on(database, tmp_path, run_id, stall_seconds=2.0)
    assert state is RunState.FAILED
    with database.read() as session:
        (guilty,) = [prompt.id for prompt in session.scalars(select(Prompt)) if prompt.meta["level"] == 59]
    assert f"{module}:{function} has no scores for prompt {guilty}: killed_engine: " in str(error)
    assert said in str(error)


@POSTGRESQL
def test_where_its_first_choice_was_not_imported_the_next_is_taken(
    database: Database, tmp_path: Path, module: str
) -> None:
    """One prompt has only ada's response; the others have all three."""
    with database.write() as session:
        responses.import_responses(session, [grid(tmp_path)], layout=Layout(score=("label",)))
    file = imported_run(tmp_path)
    text = file.read_text().replace("calibration = 12", "calibration = 1").replace("holdout = 0.25", "holdout = 0")
    file.write_text(text + f'\n[strategy]\nkind = "python"\nmodel = "{module}:ranks"\n')

    run_id = work(database, tmp_path, file)

    asked = chosen(database, run_id)
    assert asked.pop("What is 0?") == "ada"
    with database.read() as session:
        reasons = dict(session.execute(select(Assignment.prompt_id, Assignment.reason)).all())
        first = session.scalars(select(Prompt.id).where(Prompt.text == "What is 0?")).one()
    assert reasons[first] == "fallback: no response of the best teacher was imported"
    assert sorted(reasons.values()).count(f"python: {module}:ranks") == 28  # of 30; one has the grid's best response
    assert sorted(asked.values()).count("cyd") >= 28


@SQLITE
def test_a_module_that_is_not_there_is_said_before_anything_is_written(database: Database, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot find the module 'no_such_module'.*add its folder to PYTHONPATH"):
        start(database, write(tmp_path, "no_such_module:f"))
    assert count(database, Run) == 0


@POSTGRESQL
def test_a_run_file_is_of_the_version_it_was_started_with_or_names(
    database: Database, tmp_path: Path, module: str
) -> None:
    file = write(tmp_path, f"{module}:by_level")
    run_id, revision = start(database, file), custom_function.revision(f"{module}:by_level")
    (tmp_path / f"{module}.py").write_text(SOURCE + "\n")
    assert start(database, file) == run_id

    text = file.read_text().replace('kind = "python"', f'kind = "python"\nrevision = "{revision}"')
    file.write_text(text)
    assert start(database, file) == run_id
    file.write_text(text.replace('name = "test"', 'name = "other"', 1))
    with pytest.raises(
        UsageError, match=f"is sha256:.*, not {revision}: restore it, or remove the revision from the run file"
    ):
        start(database, file)


@pytest.mark.parametrize("table", ['kind = "python"', 'kind = "static"\nmodel = "a:b"', 'model = "a:b"'])
def test_a_function_goes_with_its_kind(tmp_path: Path, table: str) -> None:
    file = write_run(tmp_path, strategy="static")
    file.write_text(file.read_text().replace('kind = "static"', table))
    with pytest.raises(UsageError, match=r"\[strategy\] python needs model"):
        run_file.read(file)
