"""At alpha 0 a run asks no student: it needs none, has it score nothing, and shows no learnability."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select, text

from persyn.analysis import plan, tables
from persyn.analysis.compare import Reward
from persyn.config import load_config
from persyn.db import grid, lookup
from persyn.db.catalog import Run, Scorer
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.db.work import Job
from persyn.errors import UsageError
from persyn.ingest import versions
from persyn.runs import pipeline, run_file, transport
from tests.cli.conftest import Persyn
from tests.run_files import write_run

#: A whole run of the smallest size: 12 calibration prompts and 8 others.
SMALL = {"prompts": 20, "calibration": 12}


def without_student(file: Path) -> Path:
    before, _, rest = file.read_text().partition("[student]")
    file.write_text(before + rest[rest.index("[quality]") :])
    return file


def start(database: Database, file: Path) -> int:
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def test_a_run_without_a_student_is_worked_and_shown_without_learnability(persyn: Persyn, tmp_path: Path) -> None:
    file = str(without_student(write_run(tmp_path, alpha=0, **SMALL)))
    started = persyn("run", "start", file)
    status, compared = persyn("run", "status", "test"), persyn("compare", "test")
    reported = persyn("report", "test", "-o", "report.html")
    assert [each.stderr for each in (status, compared, reported)] == [""] * 3
    assert started.returncode == 0, started.stderr
    for said in (status.stdout, compared.stdout.partition("unavailable")[0]):
        assert "learnability" not in said
        assert "learn." not in said
        assert "student" not in said
    assert "car: needs learnability, and no response has one" in compared.stdout
    page = (tmp_path / "report.html").read_text()
    assert "earnability</th>" not in page
    assert ">Student<" not in page

    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with database.read() as session:
        run = session.scalars(select(Run)).one()
        assert (run.student_id, run.learnability_scorer_id) == (None, None)
        assert set(session.scalars(select(Job.scorer_id).where(Job.stage == "score"))) == {run.quality_scorer_id}
        assert set(session.scalars(select(Score.scorer_id))) == {run.quality_scorer_id}
        assert session.scalars(select(Scorer.student_id)).all() == [None]
        found = grid.read(session, run)
        assert not np.isnan(found.rewards()).any()
        shown = session.execute(text("SELECT reward, learnability FROM v_reward_matrix ORDER BY prompt_id, position"))
        assert [tuple(row) for row in shown] == [(reward, None) for reward in found.rewards().ravel().tolist()]
        prompt_id = int(found.prompt_ids[0])
    database.close()

    traced = json.loads(persyn("trace", "test", str(prompt_id), "--json").stdout)
    assert {row["learnability"] for row in traced["responses"]} == {None}
    assert {row["scorer"] for row in traced["scores"]} == {"fake"}
    manifest = json.loads((tmp_path / "home" / "datasets" / "test" / "manifest.json").read_text())
    assert manifest["student"] is None
    card = (tmp_path / "home" / "datasets" / "test" / "README.md").read_text()
    assert "conversations to fine-tune a student" in card
    assert "| student |" not in card
    refused = persyn("compare", "test", "--alpha", "0.4")
    assert refused.returncode == 2
    assert "no reward at alpha 0.4: the run is at alpha 0 and scores no learnability. Start a run" in refused.stderr


def test_what_needs_a_student_is_refused_where_there_is_none(database: Database, tmp_path: Path) -> None:
    run_id = start(database, without_student(write_run(tmp_path, alpha=0, **SMALL)))
    with database.write() as session:
        run = session.get_one(Run, run_id)
        with pytest.raises(UsageError, match="run 'test' has no learnability to define"):
            grid.read(session, run, on="answer")
        with pytest.raises(UsageError, match=r"run test has no student; start a run under another name"):
            lookup.student(session, run)
        with pytest.raises(UsageError, match="run 'test' has no student; it has quality"):
            transport.change_one(session, run, "student", {"gpus": 1}, actor="me")


def test_a_student_at_alpha_0_is_kept_and_scores_nothing(database: Database, tmp_path: Path) -> None:
    run_id = start(database, write_run(tmp_path, alpha=0, **SMALL))

    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.student_id is not None
        assert run.learnability_scorer_id is None
        assert load_config(run.config).student is not None
        assert session.scalars(select(Scorer.kind)).all() == ["fake"]  # the quality's
        shares = [share for share in plan.of_run(session, run).shares if share.stage == "calibrate"]
        assert [share.scores_to_make for share in shares] == [12, 12, 12]
        with pytest.raises(UsageError, match=r"no reward at alpha 0\.4.*only the student scores"):
            tables.rewards(session, run, Reward(alpha=0.4))


@pytest.mark.parametrize("strategy", ["car", "persyn"])
def test_a_strategy_that_reads_learnability_has_the_student_score_at_alpha_0(
    database: Database, tmp_path: Path, strategy: str
) -> None:
    run_id = start(database, write_run(tmp_path, alpha=0, strategy=strategy, **SMALL))
    with database.read() as session:
        assert (session.get_one(Run, run_id).learnability_scorer_id is not None) == (strategy == "car")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"alpha": 0.4}, r"\[student\] is missing: at alpha 0\.4, rewards depend on learnability"),
        ({"alpha": 0, "strategy": "car"}, r"strategy car needs learnability, also at alpha 0; add \[student\]"),
        ({"alpha": 0, "strategy": "family-strong"}, r"needs a \[student\] family that a teacher has, got None"),
    ],
)
def test_a_run_that_needs_a_student_says_so(tmp_path: Path, run: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_file.read(without_student(write_run(tmp_path, **run)))


def test_a_run_of_an_earlier_version_goes_on_with_its_learnability(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, alpha=0, **SMALL)
    run_id = start(database, file)
    with database.write() as session:  # as an earlier version registered it
        run, config = session.get_one(Run, run_id), run_file.read(file)
        assert config.student is not None
        student = versions.student(session, config.student, {})
        run.learnability_scorer_id = versions.learnability(session, student, config.student)

    assert start(database, file) == run_id
    with database.read() as session:
        run = session.get_one(Run, run_id)
        shares = [share for share in plan.of_run(session, run).shares if share.stage == "calibrate"]
        assert [share.scores_to_make for share in shares] == [24, 24, 24]
        assert grid.read(session, run).rewards(alpha=0.4).shape == (12, 3)


def test_a_student_is_not_added_to_a_run_without_notice(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, alpha=0, **SMALL)
    whole = file.read_text()
    run_id = start(database, without_student(file))
    assert start(database, file) == run_id
    file.write_text(whole)
    with pytest.raises(UsageError, match=r"another configuration .*student was not set and is"):
        start(database, file)
