"""More prompts for a run that is done or running."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from persyn.analysis import audit, extension
from persyn.analysis.extension import Extended, Teller
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunState
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Router
from persyn.db.spending import PlannedWork
from persyn.db.work import Event, Job, JobState
from persyn.errors import UsageError
from persyn.ingest.prompt_import import PromptFiles
from persyn.runs import pipeline, run_file, same_run
from persyn.runs.extension import of_run
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests import whole_runs
from tests.run_files import PROMPTS, write_run

SILENT = Teller(lambda text: None)


def write_more(folder: Path, numbers: Sequence[int], name: str = "more.jsonl") -> PromptFiles:
    rows = [{"prompt": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in numbers]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptFiles([folder / name])


def extend(database: Database, run_id: int, files: PromptFiles) -> Extended:
    return extension.extend(database, run_id, files, None, SILENT)


def assigned(database: Database) -> dict[str, tuple[int, str]]:
    """{prompt: (teacher, reason)}."""
    with database.read() as session:
        columns = Prompt.text, Assignment.teacher_id, Assignment.reason
        found = session.execute(select(*columns).join(Assignment, Assignment.prompt_id == Prompt.id))
        return {text: (teacher_id, reason) for text, teacher_id, reason in found}


def count(database: Database, column: object, *where: object) -> int:
    with database.read() as session:
        return session.scalars(select(func.count(column)).where(*where)).one()  # type: ignore[call-overload, no-any-return]


def planned(database: Database) -> float:
    """Requests of `generate` in the plan that was made when it began."""
    with database.read() as session:
        made = PlannedWork.made_in == "generate", PlannedWork.stage == "generate"
        return float(session.execute(select(func.sum(PlannedWork.requests)).where(*made)).scalar_one())


def start(database: Database, file: Path) -> int:
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def test_new_prompts_of_a_done_run_are_routed_and_answered_and_nothing_is_calibrated_again(
    database: Database, tmp_path: Path
) -> None:
    run_id = whole_runs.work(database, tmp_path, write_run(tmp_path))
    before, jobs = assigned(database), count(database, Job.id, Job.stage.in_(("calibrate", "score", "fit_router")))
    responses, was_planned = count(database, Response.id), planned(database)
    files = write_more(tmp_path, range(PROMPTS - 4, PROMPTS + 6))  # four are in the run

    plan = extension.plan(database, run_id, files, SILENT)
    assert (plan.undecided, plan.least.responses, plan.most.responses) == (6, 6, 6)
    assert (count(database, RunPrompt.prompt_id), count(database, Prompt.id)) == (PROMPTS, PROMPTS)
    done = extend(database, run_id, files)
    assert planned(database) == pytest.approx(was_planned + 6)
    whole_runs.go_on(database, tmp_path, run_id)

    assert (done.made.prompts, done.report.rows, done.report.new) == (6, 10, 6)
    after = assigned(database)
    assert {text: after[text] for text in before} == before
    assert {reason for text, (_, reason) in after.items() if text not in before} == {"router: fake"}
    assert len(after) == PROMPTS + 6
    assert count(database, Response.id) == responses + 6  # one response for each, and none else
    assert count(database, Job.id, Job.stage.in_(("calibrate", "score", "fit_router"))) == jobs
    assert count(database, Router.id) == 1
    assert count(database, RunPrompt.prompt_id, RunPrompt.role == Role.TARGET, RunPrompt.extension == 1) == 6

    events = count(database, Event.id)  # the same again
    assert extend(database, run_id, files).made.prompts == 0
    assert count(database, Event.id) == events
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE
        assert [(each.number, each.prompts, each.files) for each in of_run(session, run)] == [(1, 6, ["more.jsonl"])]


def work_until(database: Database, folder: Path, run_id: int, stage: str) -> None:
    """Work a run until it has reached a stage, whose jobs are not all done."""
    worker = Worker(database, Settings(str(database.url), folder), run_id=run_id)
    thread = threading.Thread(target=worker.run)
    thread.start()
    while count(database, Run.id, Run.stage == stage) == 0 and thread.is_alive():
        time.sleep(0.005)
    worker.stop.set()
    thread.join()


def test_a_run_that_is_extended_while_it_runs_answers_each_prompt_once(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, options={"latency_seconds": 0.05})
    run_id = start(database, file)
    work_until(database, tmp_path, run_id, "generate")
    extend(database, run_id, write_more(tmp_path, range(PROMPTS, PROMPTS + 5)))
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.stage) == (RunState.RUNNING, "assign")
        assert count(database, Job.id, Job.stage == "generate", Job.state == JobState.QUEUED) > 0
        assert list(audit.audit(session, run)) == []

    whole_runs.go_on(database, tmp_path, run_id)

    assert len(assigned(database)) == PROMPTS + 5
    assert count(database, Response.id, Response.failure.is_(None)) == 12 * 3 + (PROMPTS - 12) + 5
    assert count(database, RunPrompt.prompt_id, RunPrompt.role != Role.TARGET) == 12


def test_the_old_run_file_is_still_the_run_s_and_a_file_that_grew_names_the_way(
    database: Database, tmp_path: Path
) -> None:
    file = write_run(tmp_path)
    run_id = start(database, file)
    extend(database, run_id, write_more(tmp_path, range(PROMPTS, PROMPTS + 5)))
    prompts = tmp_path / "prompts.jsonl"

    assert start(database, file) == run_id
    rows = prompts.read_text()
    prompts.write_text("\n" + rows)  # other bytes, the same prompts
    assert start(database, file) == run_id
    prompts.write_text(rows + (tmp_path / "more.jsonl").read_text())  # with those of the extension
    assert start(database, file) == run_id
    prompts.write_text(rows + '{"prompt": "And now?"}\n')
    with pytest.raises(UsageError, match=r"1 prompt is new; the run keeps its 65 prompts.*run extend test FILE"):
        start(database, file)
    prompts.write_text("".join(rows.splitlines(keepends=True)[2:]))
    with database.read() as session:
        change = same_run.look(session, session.get_one(Run, run_id))
    assert change is not None
    assert (change.new, change.gone) == (0, 2)


def test_a_bad_row_leaves_the_run_as_it_was(database: Database, tmp_path: Path) -> None:
    run_id = start(database, write_run(tmp_path))
    files = write_more(tmp_path, range(PROMPTS, PROMPTS + 5))
    with (tmp_path / "more.jsonl").open("a") as file:
        file.write('{"prompt": 7}\n')

    with pytest.raises(UsageError, match=r"more\.jsonl:6.*"):
        extend(database, run_id, files)

    assert count(database, RunPrompt.prompt_id) == count(database, Prompt.id) == PROMPTS


@pytest.mark.parametrize(
    ("state", "says"),
    [(RunState.FAILED, "is failed.*persyn run resume"), (RunState.PAUSED, "is paused.*persyn run resume")],
)
def test_a_run_that_stopped_takes_no_prompts(database: Database, tmp_path: Path, state: RunState, says: str) -> None:
    run_id = start(database, write_run(tmp_path))
    with database.write() as session:
        session.execute(update(Run).values(state=state))

    with pytest.raises(UsageError, match=says):
        extend(database, run_id, write_more(tmp_path, [PROMPTS]))

    assert count(database, Prompt.id) == PROMPTS


def test_the_oracle_has_no_router_for_more_prompts(database: Database, tmp_path: Path) -> None:
    run_id = start(database, write_run(tmp_path, prompts=9, strategy="oracle"))

    with pytest.raises(UsageError, match="oracle, which has every teacher answer every prompt"):
        extend(database, run_id, write_more(tmp_path, [PROMPTS]))
