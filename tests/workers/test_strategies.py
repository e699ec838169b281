"""Runs with strategies other than the router, and runs on imported responses."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, func, select

from persyn.analysis import summary
from persyn.analysis.compare import compare
from persyn.db import grid as stored_grid
from persyn.db.catalog import Prompt, Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, RouterScore, Score
from persyn.errors import UsageError
from persyn.ingest import responses
from persyn.ingest.response_rows import Layout
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import PROMPTS, TEACHERS, write_run
from tests.whole_runs import go_on, work


def chosen(database: Database, run_id: int) -> dict[str, str]:
    """The teacher of each prompt, by its text."""
    with database.read() as session:
        found = session.execute(
            select(Prompt.text, Teacher.name)
            .select_from(Assignment)
            .join(Prompt, Prompt.id == Assignment.prompt_id)
            .join(Teacher, Teacher.id == Assignment.teacher_id)
            .where(Assignment.run_id == run_id)
        )
        return {text: name for text, name in found}


def count(database: Database, model: Any) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(model)).one()


@pytest.mark.parametrize(("kind", "teacher"), [("strong", "cyd"), ("family-strong", "ada")])
@SQLITE
def test_a_single_teacher_answers_everything_and_nothing_is_calibrated(
    database: Database, tmp_path: Path, kind: str, teacher: str
) -> None:
    run_id = work(database, tmp_path, write_run(tmp_path, strategy=kind))

    assert set(chosen(database, run_id).values()) == {teacher}
    assert (count(database, Response), count(database, Score), count(database, RouterScore)) == (PROMPTS, 0, 0)
    with database.read() as session, pytest.raises(UsageError, match=f"{kind}, which has no calibration grid"):
        compare(session, session.get_one(Run, run_id))


@pytest.mark.parametrize("kind", ["static", "car"])
@POSTGRESQL
def test_what_the_grid_decides_needs_the_grid_and_no_router(database: Database, tmp_path: Path, kind: str) -> None:
    run_id = work(database, tmp_path, write_run(tmp_path, strategy=kind))

    assert len(set(chosen(database, run_id).values())) == 1
    assert count(database, Response) == 12 * len(TEACHERS) + (PROMPTS - 12)
    assert count(database, RouterScore) == 0
    with database.read() as session:
        found = compare(session, session.get_one(Run, run_id))
    # The comparison uses the same inputs: the nine prompts outside the hold-out.
    assert (found.n_holdout, found.n_calibration) == (3, 9)
    shares = {fact.strategy: fact.shares for fact in found.strategies}
    assert shares[kind] == dict.fromkeys(chosen(database, run_id).values(), 1.0)


@SQLITE
def test_a_grid_without_any_reward_decides_nothing(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, strategy="static")
    text = file.read_text().replace('kind = "fake"', 'kind = "imported"\nmodel = "label"', 1)
    file.write_text(text)
    (tmp_path / "other.jsonl").write_text('{"prompt": "Why?", "teacher": "eve", "response": "So.", "label": 1}\n')
    with database.write() as session:
        responses.import_responses(session, [tmp_path / "other.jsonl"], layout=Layout(score=("label",)))
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    Worker(database, Settings(str(database.url), tmp_path), run_id=run_id).run()
    with database.read() as session:
        run = session.get_one(Run, run_id)
    assert run.state is RunState.FAILED
    assert "strategy static: no response of the calibration grid has a reward" in str(run.error)


@SQLITE
def test_a_random_choice_is_the_seeds_and_the_prompts_alone(database: Database, tmp_path: Path) -> None:
    first = work(database, tmp_path, write_run(tmp_path, strategy="random", prompts=300))
    again = work(database, tmp_path, write_run(tmp_path, strategy="random", prompts=150, name="again"))
    other = work(database, tmp_path, write_run(tmp_path, strategy="random", prompts=150, name="other", seed=1))

    wanted = chosen(database, first)
    assert chosen(database, again).items() <= wanted.items()
    assert not chosen(database, other).items() <= wanted.items()
    # 300 prompts, three teachers: mean 100, standard deviation 8.2.
    assert all(65 <= n <= 135 for n in Counter(wanted.values()).values())


@SQLITE
def test_a_mix_asks_the_strongest_now_and_then_and_the_weakest_otherwise(database: Database, tmp_path: Path) -> None:
    counts = Counter(
        chosen(database, work(database, tmp_path, write_run(tmp_path, strategy="mix", prompts=300))).values()
    )
    assert set(counts) == {"ada", "cyd"}
    assert 35 <= counts["cyd"] <= 85  # mean 60, standard deviation 6.9


@POSTGRESQL
def test_an_oracle_has_everybody_answer_everything(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_grid, "_PART", 6)  # so that 20 prompts are read in four parts
    run_id = work(database, tmp_path, write_run(tmp_path, strategy="oracle", prompts=20))

    assert count(database, Response) == 20 * len(TEACHERS)
    with database.read() as session:
        reasons = session.scalars(select(Assignment.reason).where(Assignment.run_id == run_id)).all()
        best = session.scalars(select(Assignment.score).where(Assignment.run_id == run_id)).all()
        run = session.get_one(Run, run_id)
        found, facts, cells = compare(session, run), summary.facts(session, run), stored_grid.read(session, run)
    assert reasons == ["calibration"] * 20
    for values, name in ((cells.quality, "quality"), (cells.rewards(), "reward")):
        assert [getattr(each, name) for each in facts.teachers] == pytest.approx(np.nanmean(values, axis=0).tolist())
    assert min(best) >= 0.5  # one of three teachers always has half of each part
    assert (found.n_holdout, found.n_calibration) == (5, 15)


def imported_run(folder: Path) -> Path:
    """A run on the grid that `grid` writes."""
    teachers = "".join(
        f'[[teachers]]\nname = "{name}"\nmodel = "{name}"\nengine = "imported"\ngpus = 0\n' for name in TEACHERS
    )
    file = folder / "imported.toml"
    file.write_text(
        '[run]\nname = "imported"\nsetting = "instruct"\ncalibration = 12\nholdout = 0.25\njob_prompts = 8\n'
        '[prompts]\nsource = "grid.jsonl"\n'
        '[student]\nname = "student"\nmodel = "student"\nengine = "fake"\n'
        '[quality]\nkind = "imported"\nmodel = "label"\n'
        '[router]\nbackbone = "backbone"\nengine = "fake"\n' + teachers
    )
    return file


def grid(folder: Path, *, prompts: int = 30) -> Path:
    """Every teacher's responses, but only ada's to the first prompt."""
    rows = [
        {"prompt": f"What is {n}?", "teacher": name, "response": f"{name} says {n}.", "label": n % 2 == 0}
        for n in range(prompts)
        for name in TEACHERS
        if n or name == "ada"
    ]
    path = folder / "grid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_imported_grid_is_scored_routed_and_answered_as_if_it_had_been_made_here(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        responses.import_responses(session, [grid(tmp_path)], layout=Layout(score=("label",)))
    before = count(database, Response)

    run_id = work(database, tmp_path, imported_run(tmp_path))

    wanted = chosen(database, run_id)
    assert len(wanted) == 30
    assert wanted["What is 0?"] == "ada"  # only ada's response exists
    with database.read() as session:
        answered = session.scalars(
            select(func.count())
            .select_from(Assignment)
            .join(
                Response,
                (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id),
            )
            .where(Response.text.is_not(None))
        ).one()
        made_up = session.scalars(select(Response.failure).where(Response.failure.is_not(None))).all()
    assert answered == 30
    assert count(database, Response) - before == len(made_up) <= 2  # gaps in the calibration grid
    assert all(reason.startswith("not_imported") for reason in made_up)


def test_a_run_names_no_imported_teacher_that_has_no_response(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        responses.import_responses(session, [grid(tmp_path)])
    file = imported_run(tmp_path)
    file.write_text(file.read_text().replace('model = "cyd"', 'model = "cid"'))

    with pytest.raises(UsageError, match="no response of teacher 'cid' was imported"):
        work(database, tmp_path, file)
    assert count(database, Run) == 0


def test_a_later_import_fills_the_gaps_and_scores_only_them(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        responses.import_responses(session, [grid(tmp_path)], layout=Layout(score=("label",)))
    work(database, tmp_path, imported_run(tmp_path))
    scored = count(database, Score)
    rest = tmp_path / "rest.jsonl"
    rest.write_text(
        "".join(
            json.dumps({"prompt": "What is 0?", "teacher": name, "response": "Nought.", "label": 1}) + "\n"
            for name in ("bob", "cyd")
        )
    )

    with database.write() as session:
        report = responses.import_responses(session, [rest], layout=Layout(score=("label",)))
    text = imported_run(tmp_path).read_text().replace('name = "imported"', 'name = "second"', 1)
    (tmp_path / "second.toml").write_text(text)
    work(database, tmp_path, tmp_path / "second.toml")

    assert report.new + report.replaced == 2
    in_grid = report.replaced  # whether the first prompt is in the calibration grid
    assert count(database, Score) - scored == 2 + in_grid


@POSTGRESQL
def test_a_grid_without_a_reward_is_refused_and_the_run_goes_on_once_it_has_some(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_mended = tmp_path / "is_mended"
    (tmp_path / "unsure_scorer.py").write_text(
        "from pathlib import Path\n"
        "def score(messages, response, answer, meta):\n"
        f"    return float(len(response)) if Path({str(is_mended)!r}).exists() else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    file = write_run(tmp_path)
    quality = 'kind = "python"\nmodel = "unsure_scorer:score"'
    file.write_text(file.read_text().replace('[quality]\nkind = "fake"', f"[quality]\n{quality}"))
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id

    Worker(database, Settings(str(database.url), tmp_path), run_id=run_id).run()

    with database.write() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.error) == (
            RunState.FAILED,
            "stage fit_router: no response of the calibration grid has a reward",
        )
        assert not session.scalars(select(RouterScore.score)).all()
        session.execute(delete(Score).where(Score.failure.is_not(None)))
        is_mended.touch()
        pipeline.resume(session, run, actor="me")
    go_on(database, tmp_path, run_id)
