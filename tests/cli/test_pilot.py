"""A pilot on the command line: planned, killed, continued, and said in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

from persyn.api import open as open_store
from persyn.cli.main import persyn
from persyn.db.catalog import Prompt, Run, Student
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.errors import UsageError
from persyn.llm.identity import identify
from persyn.settings import Settings
from persyn.student import become, pilot, pilot_plan
from persyn.student.pilot_plan import PilotSettings
from persyn.student.training_settings import TrainingSettings
from tests.factories import make_response, make_run, make_scorer

PILOT = ("pilot", "run", "--alpha", "1", "--epochs", "1", "--learning-rate", "0.01", "--batch-size", "4")
PILOT += ("--max-tokens", "4")
PLANNED = PilotSettings(TrainingSettings(epochs=1, learning_rate=0.01, batch_size=4), alphas=[1.0], max_tokens=4)
#: Of two teachers: quality, and nats per token; `b` is right about odd prompts alone and easier for the student.
QUALITY = {"a": (1.0, 1.0), "b": (0.0, 1.0)}
NATS = {"a": -2.0, "b": -1.0}


@pytest.fixture
def store(home: Path, tiny: Path) -> Database:
    """A run whose grid of 18 prompts, 6 of them held out, is scored, and whose student is a real model."""
    database = Database(f"sqlite:///{home / 'persyn.db'}")
    database.require_head()
    with database.write() as session:
        made = make_run(session, prompts=18, calibration=12, holdout=6, stage="fit_router")
        run = session.get_one(Run, made.id)
        run.quality_scorer_id = make_scorer(session, "math")
        run.config = {
            **run.config,
            "run": {**run.config["run"], "alpha": 0.4, "calibration": 18},
            "student": {"name": "student", "model": str(tiny)},
            "quality": {"kind": "math"},
        }
        student = session.get_one(Student, run.student_id)
        student.model, student.revision = str(tiny), identify(str(tiny)).revision
        for number, prompt_id in enumerate(made.prompt_ids):
            session.get_one(Prompt, prompt_id).answer = str(number)
            for name, teacher_id in zip("ab", made.teacher_ids, strict=True):
                response = make_response(session, prompt_id, teacher_id, f"{name}: \\boxed{{{number}}}.")
                found = {run.quality_scorer_id: (QUALITY[name][number % 2], None)}
                found[run.learnability_scorer_id] = (10 * NATS[name], 10)
                for scorer_id, (value, n_tokens) in found.items():
                    session.add(
                        Score(response_id=response, scorer_id=scorer_id, value=value, n_tokens=n_tokens, detail={})
                    )
    return database


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(persyn, arguments)


def test_a_pilot_that_was_killed_goes_on_with_the_students_that_are_missing(store: Database, home: Path) -> None:
    # Of even prompts `a` alone is right, and of odd ones both; `b` is always easier. So 0.4 takes `a` and `b` in turn,
    # and 1 takes what teacher `b` wrote.
    planned = typed(*PILOT, "--plan")
    first = subprocess.Popen([sys.executable, "-m", "persyn.cli", *PILOT], env=os.environ)
    # The untrained student is there, and another one is being trained.
    while not (kept := became(home)) or not training(home, kept[0].parent):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while any(str(home) in " ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])):
        time.sleep(0.05)  # the child ends, too
    changed_at = [path.stat().st_mtime_ns for path in kept]

    with store.read() as session:
        plan = pilot_plan.read(session, session.scalars(select(Run)).one(), PLANNED)
    settings = Settings.from_environment()
    pilot.run(store, plan, settings, lambda *_: None, do=become.become)
    done = typed(*PILOT, "--json")

    said = (
        "4 students, the untrained one included, x 12 responses, 1 epochs; 6 prompts are asked, and 9 responses shown"
    )
    assert said in planned.output
    assert done.exit_code == 0, done.output
    assert "4 are there" in done.stderr
    assert [path.stat().st_mtime_ns for path in kept] == changed_at
    assert len(became(home)) == 4
    assert training(home) == []
    found = json.loads(done.stdout)
    assert (found["by"], found["n_learned"], found["n_asked"], found["outcome"]) == ("quality", 12, 6, "cannot tell")
    assert sorted(each["trained_on"] for each in found["students"]) == [
        ["a"],
        ["b", "log_likelihood, alpha 1"],
        ["log_likelihood, alpha 0.4"],
    ]
    assert "was stored by an earlier version of PerSyn" in found["left_out"]["ifd"]
    # By another measure, no student is trained again.
    likely = typed(*PILOT, "--by", "likelihood")
    assert likely.exit_code == 0, likely.output
    assert "others by likelihood (nats per token); untrained -" in likely.stdout
    assert "cannot tell: 3 different students are too few" in likely.stdout
    assert "advice: keep yours, log_likelihood, alpha 0.4" in likely.stdout


def became(home: Path) -> list[Path]:
    """What students became, without those that are just being stored (`NAME.new-...`)."""
    return [path for path in (home / "pilots").glob("*/student.json") if not path.parent.suffix]


def training(home: Path, *done: Path) -> list[Path]:
    """The folders of students that are being trained."""
    return [path for path in (home / "pilots").glob("*.training") if path.with_suffix("") not in done]


def test_a_folder_of_another_training_is_refused(store: Database, home: Path) -> None:
    (home / "pilots").mkdir()
    with store.read() as session:
        plan = pilot_plan.read(session, session.scalars(select(Run)).one(), pilot_plan.PilotSettings())
    job = next(pilot._jobs(store, plan))
    folder = pilot._folder(home, job)
    folder.mkdir()
    (folder / "student.json").write_text('{"key": "other", "responses": [], "log_likelihoods": [], "notes": null}')

    assert "is the result of another training; remove it" in str(typed("pilot", "run").exception)
    (folder / "student.json").write_text("{")
    assert "is not the result of a trained student" in str(typed("pilot", "run").exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none",), "there is no run named 'none'"),
        (("run", "--alpha", "2"), "Expected `float` <= 1.0"),
        (("run", "--alpha", "x"), "--alpha takes numbers from 0 to 1"),
        (("run", "--epochs", "0"), "Expected `int` >= 1"),
    ],
)
def test_wrong_usage_is_said(store: Database, arguments: tuple[str, ...], said: str) -> None:
    assert said in str(typed("pilot", *arguments).exception)


@pytest.mark.parametrize("option", ["--prompts", "--asked", "--seeds", "--max-tokens"])
def test_a_number_below_1_is_refused(option: str) -> None:
    assert "0 is not in the range x>=1" in typed("pilot", "run", option, "0").output


def changed(store: Database, **tables: dict[str, object]) -> str:
    """What is said where the run's configuration has these tables."""
    with store.write() as session:
        run = session.scalars(select(Run)).one()
        run.config = {**run.config, **{name: {**run.config[name], **table} for name, table in tables.items()}}
    return str(typed("pilot", "run", "--plan").exception)


def test_wrong_settings_are_said_in_python(store: Database) -> None:
    with open_store() as opened, pytest.raises(UsageError, match="settings must be a valid persyn"):
        opened.run("run").pilot(PilotSettings(alphas=[2.0]))


def test_a_student_that_cannot_be_trained_is_said(store: Database) -> None:
    assert "run run has a student on engine fake, which cannot be trained here" in changed(
        store, student={"engine": "fake"}
    )


def test_a_run_that_is_not_scored_is_said(store: Database) -> None:
    with store.write() as session:
        session.scalars(select(Run)).one().stage = "score"

    assert "has not scored its calibration grid yet" in str(typed("pilot", "run").exception)


def test_a_quality_that_scores_no_new_response_leaves_the_likelihood(store: Database) -> None:
    assert changed(store, quality={"kind": "imported", "model": "right"}) == "None"
    assert "cannot score a student's responses; use --by likelihood" in str(
        typed("pilot", "run", "--by", "quality").exception
    )
    assert "no prompt is asked" in typed("pilot", "run", "--plan").output


def test_too_few_answers_are_said(store: Database) -> None:
    with store.write() as session:
        of_b = session.scalars(select(Response).where(Response.text.startswith("b")).order_by(Response.id)).all()
        for response in of_b[1:3]:
            response.text, response.failure = None, "empty: x"
    assert "only 89% of its responses" not in typed("pilot", "run", "--plan").output

    assert "has 1 teachers whose responses" in str(typed("pilot", "run", "--plan").exception)
