"""More calibration prompts for a run, another router, and what becomes of prompts that are not answered yet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from persyn.analysis import audit, extension, recalibration, spending
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Router
from persyn.db.spending import PlannedWork
from persyn.db.work import Event, Job, JobState
from persyn.errors import UsageError
from persyn.ingest.prompt_import import PromptFiles
from persyn.runs.recalibration import Choose
from persyn.stages import recalibrations
from persyn.stages.recalibrations import Recalibration
from tests import whole_runs
from tests.one_database import SQLITE
from tests.run_files import PROMPTS, write_run
from tests.runs.test_extend import SILENT, assigned, count, start, work_until, write_more


def recalibrate(database: Database, run_id: int, n: int, how: Choose = "active") -> Recalibration:
    return recalibration.recalibrate(database, run_id, n, how)


def said(database: Database, run_id: int) -> list[str]:
    with database.read() as session:
        return recalibration.words(session, session.get_one(Run, run_id))


def planned(database: Database) -> float:
    """Requests of `calibrate` in the plan."""
    with database.read() as session:
        return float(
            session.execute(select(func.sum(PlannedWork.requests)).where(PlannedWork.stage == "calibrate")).scalar_one()
        )


@SQLITE
def test_a_done_run_asks_all_teachers_more_prompts_and_fits_another_router(database: Database, tmp_path: Path) -> None:
    run_id = start(database, write_run(tmp_path))
    spending.record(database, run_id, is_start=True)
    whole_runs.go_on(database, tmp_path, run_id)
    before, responses, was_planned = assigned(database), count(database, Response.id), planned(database)

    plan = recalibration.plan(database, run_id, 5, "active")
    assert (plan.calibration, plan.least.responses) == (12 + 5, 5 * 2)  # one of three teachers has answered each
    assert count(database, RunPrompt.prompt_id, RunPrompt.role != Role.TARGET) == 12
    made = recalibrate(database, run_id, 5)
    assert planned(database) == pytest.approx(was_planned + 10)
    with pytest.raises(UsageError, match="it has no router at the moment, since it is calibrated"):
        recalibrate(database, run_id, 5)
    whole_runs.go_on(database, tmp_path, run_id)

    assert made == Recalibration(1, prompts=5, of_extensions=0, reopened=0, router_id=1)
    assert count(database, Response.id) == responses + 5 * 2
    assert assigned(database) == before  # they were all answered
    assert count(database, Router.id) == 2
    roles = {role: count(database, RunPrompt.prompt_id, RunPrompt.role == role) for role in Role}
    assert roles == {Role.CALIBRATION: 9 + 5, Role.HOLDOUT: 3, Role.TARGET: PROMPTS - 17}
    assert said(database, run_id)[0].startswith(
        "recalibration 1: all teachers were asked 5 more prompts; reward of the router"
    )
    assert said(database, run_id)[0].endswith("all prompts were answered already, and keep their teachers")
    with database.read() as session:
        run = session.get_one(Run, run_id)
        decided = [e.detail["decided"] for e in session.scalars(select(Event)) if "decided" in e.detail]
        assert len(decided) == 2  # the other router has a verdict of its own
        assert run.router_id == 2

    recalibrate(database, run_id, 2, "random")
    whole_runs.go_on(database, tmp_path, run_id)
    with database.read() as session:
        asked = select(RunPrompt.recalibration, func.count()).where(RunPrompt.recalibration > 0)
        rows = session.execute(asked.group_by(RunPrompt.recalibration)).all()
        assert {tuple(row) for row in rows} == {(1, 5), (2, 2)}


#: Recalibrates a run of a store, and is killed at a moment of the first commit.
KILLED = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.orm import Session
from persyn.analysis import recalibration
from persyn.db.connect import Database
url, run_id, moment = sys.argv[1:]

def kill(session):
    if not session.in_nested_transaction():
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Session, moment, kill)
recalibration.recalibrate(Database(url), int(run_id), 5, "active")
"""


@SQLITE
@pytest.mark.parametrize(("moment", "is_made"), [("before_commit", False), ("after_commit", True)])
def test_a_recalibration_that_is_killed_was_made_as_a_whole_or_not_at_all(
    database: Database, database_url: str, tmp_path: Path, moment: str, is_made: bool
) -> None:
    run_id = whole_runs.work(database, tmp_path, write_run(tmp_path))
    responses = count(database, Response.id)
    process = subprocess.run([sys.executable, "-c", KILLED, database_url, str(run_id), moment], check=False)

    assert process.returncode == -signal.SIGKILL
    assert count(database, Run.id, Run.state == RunState.RUNNING) == is_made
    assert count(database, RunPrompt.prompt_id, RunPrompt.recalibration > 0) == 5 * is_made
    if is_made:
        with pytest.raises(UsageError, match="it has no router at the moment, since it is calibrated"):
            recalibrate(database, run_id, 5)
    else:
        recalibrate(database, run_id, 5)
    whole_runs.go_on(database, tmp_path, run_id)
    assert count(database, Response.id) == responses + 5 * 2
    assert count(database, Router.id) == 2


def test_a_run_in_the_middle_keeps_what_is_answered_and_assigns_the_rest_again(
    database: Database, tmp_path: Path
) -> None:
    run_id = start(database, write_run(tmp_path, options={"latency_seconds": 0.05}))
    work_until(database, tmp_path, run_id, "generate")
    before = assigned(database)
    with database.read() as session:
        answered = set(
            session.scalars(
                select(Prompt.text)
                .join(Assignment, Assignment.prompt_id == Prompt.id)
                .join(Response, Response.prompt_id == Prompt.id)
                .where(Response.teacher_id == Assignment.teacher_id)
            )
        )
    made = recalibrate(database, run_id, 6)
    assert made.reopened == PROMPTS - len(answered)
    assert assigned(database).keys() == answered
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.stage, run.router_id) == (RunState.RUNNING, "calibrate", None)
        assert list(audit.audit(session, run)) == []

    work_until(database, tmp_path, run_id, "score")  # and stopped there
    whole_runs.go_on(database, tmp_path, run_id)

    after = assigned(database)
    assert {text: after[text] for text in answered} == {text: before[text] for text in answered}
    assert len(after) == PROMPTS
    moved = sum(before[text][0] != after[text][0] for text in before.keys() - answered)
    with database.read() as session:
        run = session.get_one(Run, run_id)
        change = recalibrations.changes(session, run)[0]
        assert (change.number, change.moved) == (1, moved)
        assert (
            sum(each.before for each in change.teachers) == sum(each.after for each in change.teachers) == made.reopened
        )
        assert change.measured == 3 + 6  # the hold-out, and the prompts that were asked, cross-fitted
        assert change.gain is not None
        assert change.after == pytest.approx(change.before + change.gain.mean)
    assert f"{moved:,} of {made.reopened:,} unanswered prompts changed teachers" in said(database, run_id)[0]
    # Each prompt has a response of its teacher, and no other but in the grid.
    in_grid = (12 + 6) * 3
    assert count(database, Response.id) == in_grid + PROMPTS - 18


def test_prompts_that_a_job_asks_at_the_moment_stay_with_their_teacher(database: Database, tmp_path: Path) -> None:
    run_id = start(database, write_run(tmp_path, options={"latency_seconds": 0.05}))
    work_until(database, tmp_path, run_id, "generate")
    with database.write() as session:
        job = session.scalars(
            select(Job).where(Job.stage == "generate", Job.state == JobState.QUEUED).order_by(Job.id).limit(1)
        ).one()
        mine = (
            Assignment.teacher_id == job.teacher_id,
            Assignment.prompt_id.between(job.first_prompt_id, job.last_prompt_id),
        )
        held = set(session.scalars(select(Assignment.prompt_id).where(*mine)))
        job.state, job.owner, job.lease_until = JobState.RUNNING, "somebody", job.created_at
    assert held

    recalibrate(database, run_id, 3)

    with database.read() as session:
        assert held <= set(session.scalars(select(Assignment.prompt_id)))


@SQLITE
def test_prompts_of_an_extension_are_drawn_first_until_they_are_sampled_as_densely(
    database: Database, tmp_path: Path
) -> None:
    run_id = whole_runs.work(database, tmp_path, write_run(tmp_path))  # 12 of 60
    files = write_more(tmp_path, range(PROMPTS, PROMPTS + 20))
    extension.extend(database, run_id, files, None, SILENT)
    made = recalibrate(database, run_id, 6)  # before any of them is assigned

    assert (made.prompts, made.of_extensions, made.reopened) == (6, 5, 0)  # 5 of 20, as 13 of 60
    whole_runs.go_on(database, tmp_path, run_id)
    assert len(assigned(database)) == PROMPTS + 20


POEMS = [f"Write a poem about {number} roses." for number in range(30)]
SCORER = """
def suits(messages, response, answer, meta):
    return float(("poem" in messages[-1]["content"]) == (len(response.split()) > 5))
"""


@SQLITE
def test_a_domain_that_the_router_did_not_know_goes_to_its_own_teacher(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "domains.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    file = write_run(tmp_path, prompts=40, teachers=("brief", "long"), calibration=28, alpha=0)
    text = file.read_text().replace('[quality]\nkind = "fake"', '[quality]\nkind = "python"\nmodel = "domains:suits"')
    text = text.replace('backbone = "backbone"\nengine = "fake"', 'kind = "linear"\nencoders = ["tfidf"]')
    brief, long = (f"options = {{ response_words = {n} }}" for n in (3, 9))
    file.write_text(text.replace("options = {  }", brief, 1).replace("options = {  }", long, 1))
    run_id = whole_runs.work(database, tmp_path, file)
    (tmp_path / "poems.jsonl").write_text("".join(json.dumps({"prompt": poem}) + "\n" for poem in POEMS))
    files, tell = PromptFiles([tmp_path / "poems.jsonl"]), SILENT

    distance = extension.measure(database, run_id, files, tmp_path, tell)
    with pytest.raises(UsageError, match=r"far from all 21.*--recalibrate N .*persyn run recalibrate test --prompts N"):
        extension.require_near("test", distance)
    extension.extend(database, run_id, files, distance, tell)
    made = recalibrate(database, run_id, 8)
    whole_runs.go_on(database, tmp_path, run_id)

    assert (made.prompts, made.of_extensions) == (8, 8)
    with database.read() as session:
        key = Teacher.name, Prompt.text.like("%poem%")
        rows = session.execute(
            select(*key, func.count())
            .join(Assignment, Assignment.teacher_id == Teacher.id)
            .join(Prompt, Prompt.id == Assignment.prompt_id)
            .group_by(*key)
        )
        assert {tuple(row) for row in rows} == {("brief", False, 40), ("long", True, 30)}


@pytest.mark.parametrize(
    ("state", "says"),
    [(RunState.FAILED, "it is failed.*run resume"), (RunState.PAUSED, "it is paused.*run resume")],
)
def test_a_run_that_stopped_is_not_recalibrated(database: Database, tmp_path: Path, state: RunState, says: str) -> None:
    run_id = start(database, write_run(tmp_path))
    with database.write() as session:
        session.execute(update(Run).values(state=state))

    with pytest.raises(UsageError, match=says):
        recalibrate(database, run_id, 3)


def test_a_strategy_without_a_router_is_not_recalibrated(database: Database, tmp_path: Path) -> None:
    run_id = start(database, write_run(tmp_path, strategy="static"))

    with pytest.raises(UsageError, match="its strategy is static, which uses no router"):
        recalibrate(database, run_id, 3)
