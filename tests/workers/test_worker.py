"""A worker takes a run from prompts to responses, whatever its engines do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sqlalchemy import delete, func, select

from persyn.analysis import audit, summary
from persyn.db.catalog import Role, Run, RunPrompt, RunState, Scorer, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, RouterScore, Score
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, Load
from persyn.errors import UsageError
from persyn.jobs import queue
from persyn.llm.protocols import ModelSpec
from persyn.runs import pipeline, run_file
from persyn.runs.pipeline import STAGES
from persyn.settings import Settings
from persyn.stages import fit_router
from persyn.workers.runner.listener import Listener
from persyn.workers.runner.worker import Worker
from tests.factories import make_response
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import PROMPTS, TEACHERS, write_run


class Watching(Listener):
    """A listener that records events and may interfere."""

    def __init__(self, on_saved: Callable[[str], None] = lambda stage: None) -> None:
        self.loads: list[str] = []
        self.saves: Counter[str] = Counter()
        self.on_saved = on_saved

    def loading(self, spec: ModelSpec) -> None:
        self.loads.append(spec.model)

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        pass

    def saved(self, stage: str, done: int, failed: int) -> None:
        self.saves[stage] += done + failed
        self.on_saved(stage)


def start(database: Database, folder: Path, **run: Any) -> int:
    wanted = run_file.read(write_run(folder, **run))
    with database.write() as session:
        return pipeline.start_run(session, wanted, actor="me").id


def work(database: Database, folder: Path, run_id: int, listener: Watching | None = None, **limits: float) -> Worker:
    settings = Settings(str(database.url), folder, **limits)
    worker = Worker(database, settings, run_id=run_id, listener=listener)
    worker.run()
    return worker


def count(database: Database, what: Any, *where: Any) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(what).where(*where)).one()


def run_of(database: Database, run_id: int) -> Run:
    with database.read() as session:
        return session.get_one(Run, run_id)


def require_complete(database: Database, run_id: int) -> None:
    """Require one teacher and one response of it per prompt, and consistent counts in every stage."""
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
        for stage, counts in pipeline.progress(session, run).items():
            assert counts.pending == 0, stage
            assert counts.total == counts.done + counts.failed, stage
        answered = session.execute(
            select(Assignment.prompt_id, func.count(Response.id))
            .outerjoin(
                Response,
                (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id),
            )
            .where(Assignment.run_id == run_id)
            .group_by(Assignment.prompt_id)
        ).all()
        assert len(answered) == session.scalar(select(func.count()).where(RunPrompt.run_id == run_id))
        assert {number for _, number in answered} == {1}


@SQLITE
def test_a_run_is_worked_from_prompts_to_responses(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id)

    require_complete(database, run_id)
    grid, targets = 12 * len(TEACHERS), PROMPTS - 12
    assert count(database, Response) == grid + targets  # N responses and the grid, not N * K
    assert count(database, Score) == 2 * grid
    assert count(database, RouterScore) == PROMPTS * len(TEACHERS)
    assert count(database, RunPrompt, RunPrompt.role == Role.HOLDOUT) == 3


@POSTGRESQL
def test_each_prompt_is_answered_by_the_teacher_the_router_scores_best(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id)
    with database.read() as session:
        best = dict(
            session.execute(
                select(RouterScore.prompt_id, func.max(RouterScore.score)).group_by(RouterScore.prompt_id)
            ).all()
        )
        chosen = session.execute(
            select(Assignment.prompt_id, Assignment.score, Assignment.margin, RouterScore.score)
            .join(
                RouterScore,
                (RouterScore.prompt_id == Assignment.prompt_id) & (RouterScore.teacher_id == Assignment.teacher_id),
            )
            .where(Assignment.reason == "router: fake")
        ).all()
    assert len(chosen) == PROMPTS - 12
    for prompt_id, score, margin, router_score in chosen:
        assert score == router_score == best[prompt_id]
        assert margin > 0


def fail(database: Database, model: Any, reason: str, **where: Any) -> Any:
    """Make one row a failed one; return its key."""
    with database.write() as session:
        row = session.scalars(select(model).filter_by(**where).limit(1)).one()
        if model is Response:
            session.execute(delete(Score).where(Score.response_id == row.id))
            row.text = None
        else:
            row.value = None
        row.failure = reason
        return row.prompt_id if model is Response else row.response_id


@SQLITE
def test_answers_that_failed_in_an_outage_are_asked_again_when_somebody_says_so(
    database: Database, tmp_path: Path
) -> None:
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id)
    with database.read() as session:
        target = select(RunPrompt.prompt_id).where(RunPrompt.role == Role.TARGET).order_by(RunPrompt.prompt_id)
        lost, refused = session.scalars(target.limit(2)).all()
        learned = select(Assignment.prompt_id, Assignment.teacher_id).where(Assignment.reason == "calibration")
        on_grid, its_best = session.execute(learned.limit(1)).one()
    fail(database, Response, "server_error: HTTP 503", prompt_id=lost)
    fail(database, Response, "refused: HTTP 400", prompt_id=refused)
    fail(database, Response, "server_error: HTTP 503", prompt_id=on_grid, teacher_id=its_best % len(TEACHERS) + 1)

    with database.write() as session:
        run = session.get_one(Run, run_id)
        # What the router was trained on is left alone, as it would not be trained again.
        assert pipeline.retry_rows(session, run, ["server_error"], actor="me") == 1
    assert run_of(database, run_id).stage == "generate"
    with database.write() as session, pytest.raises(UsageError, match="is running"):
        pipeline.retry_rows(session, session.get_one(Run, run_id), ["refused"], actor="me")
    saves = Watching()
    work(database, tmp_path, run_id, saves)

    require_complete(database, run_id)
    assert saves.saves == {"generate": 1}
    assert prompts_with(database, "refused: HTTP 400") == [refused]
    assert prompts_with(database, "server_error: HTTP 503") == [on_grid]
    assert count(database, Response, Response.prompt_id == lost, Response.text.is_not(None)) == 1
    with database.write() as session, pytest.raises(UsageError, match="no failed row to retry for server_error"):
        pipeline.retry_rows(session, session.get_one(Run, run_id), ["server_error"], actor="me")


@POSTGRESQL
def test_a_run_that_could_not_learn_goes_back_to_what_failed_on_its_grid(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    interrupted = Watching(lambda stage: cancel(database, run_id) if stage == "score" else None)
    work(database, tmp_path, run_id, interrupted)
    assert run_of(database, run_id).stage == "score"
    judged = fail(database, Score, "crashed: it ended twice")
    cell = fail(database, Response, "server_error: HTTP 503", teacher_id=1)
    fail(database, Response, "too_long: 9,000 tokens", teacher_id=2)

    with database.write() as session:
        rows = pipeline.retry_rows(session, session.get_one(Run, run_id), ["server_error", "crashed"], actor="me")
    # The failed score is deleted with its response if they belong to the same cell.
    assert rows in (1, 2)
    assert run_of(database, run_id).stage == "calibrate"
    work(database, tmp_path, run_id)

    require_complete(database, run_id)
    assert count(database, Response, Response.prompt_id == cell, Response.text.is_not(None)) >= len(TEACHERS) - 1
    assert count(database, Score, Score.response_id == judged, Score.failure.is_not(None)) == 0
    assert count(database, Response, Response.failure.is_not(None)) == 1


def cancel(database: Database, run_id: int) -> None:
    with database.write() as session:
        pipeline.cancel(session, session.get_one(Run, run_id), actor="me")


def prompts_with(database: Database, failure: str) -> list[int]:
    with database.read() as session:
        return list(session.scalars(select(Response.prompt_id).where(Response.failure == failure)))


def halt(database: Database, run_id: int, stage: str) -> Watching:
    """A listener that cancels the run when it reaches a stage."""

    def when(_: str) -> None:
        if (run := run_of(database, run_id)).stage == stage and run.state is RunState.RUNNING:
            cancel(database, run_id)

    return Watching(when)


def retry_rows(database: Database, run_id: int, *reasons: str) -> int:
    with database.write() as session:
        return pipeline.retry_rows(session, session.get_one(Run, run_id), reasons, actor="me")


@SQLITE
def test_a_router_learns_from_the_rows_that_are_asked_again_too(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id, halt(database, run_id, "fit_router"))
    fail(database, Response, "server_error: HTTP 503", teacher_id=1)

    assert retry_rows(database, run_id, "server_error") == 1
    work(database, tmp_path, run_id)

    require_complete(database, run_id)
    with database.read() as session:
        run = session.get_one(Run, run_id)
        of_grid = fit_router.fit_of(session, run)[1].rewards
        assert not np.isnan(of_grid).any()
        stages = select(Job.stage).join(Event, Event.job_id == Job.id).where(Event.to_state == JobState.DONE)
        assert list(dict.fromkeys(session.scalars(stages.order_by(Event.id.desc())))) == list(STAGES)[::-1]
        assert list(audit.audit(session, run)) == []


@POSTGRESQL
def test_rows_that_are_asked_again_let_no_prompt_go_without_a_teacher(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, job_prompts=1)
    interrupted = Watching(lambda stage: cancel(database, run_id) if stage == "assign" else None)
    work(database, tmp_path, run_id, interrupted)
    with database.write() as session:
        routed = select(Assignment.prompt_id, Assignment.teacher_id).where(Assignment.reason == "router: fake")
        prompt_id, teacher_id = session.execute(routed.order_by(Assignment.prompt_id.desc()).limit(1)).one()
        # As left by another run.
        make_response(session, prompt_id, teacher_id, None, failure="server_error: HTTP 503")

    assert retry_rows(database, run_id, "server_error") == 1
    assert run_of(database, run_id).stage == "assign"
    work(database, tmp_path, run_id)

    require_complete(database, run_id)


@SQLITE
def test_an_answer_on_the_grid_that_is_asked_again_is_scored_too(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id, halt(database, run_id, "fit_router"))
    for teacher_id in range(1, len(TEACHERS) + 1):
        with database.read() as session:
            first = session.scalars(select(func.min(RunPrompt.prompt_id)).where(RunPrompt.role != Role.TARGET)).one()
        fail(database, Response, "server_error: HTTP 503", prompt_id=first, teacher_id=teacher_id)
    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, run_id), actor="me")
    work(database, tmp_path, run_id)
    router_id = run_of(database, run_id).router_id

    assert retry_rows(database, run_id, "server_error") == 1  # of those that it still needs
    assert run_of(database, run_id).stage == "calibrate"
    saves = Watching()
    work(database, tmp_path, run_id, saves)

    require_complete(database, run_id)
    assert saves.saves == {"calibrate": 1, "score": 2}
    assert run_of(database, run_id).router_id == router_id


@POSTGRESQL
def test_a_score_that_should_have_been_imported_is_not_asked_for(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id, halt(database, run_id, "fit_router"))
    with database.write() as session:
        scorer = session.get_one(Scorer, session.get_one(Run, run_id).quality_scorer_id)
        scorer.kind = "imported"
    fail(database, Score, "not_imported: no score of this response was imported", scorer_id=scorer.id)

    with pytest.raises(UsageError, match="no failed row to retry for not_imported"):
        retry_rows(database, run_id, "not_imported")


@SQLITE
def test_a_done_run_goes_on_when_another_run_has_taken_a_failed_row_of_it_back(
    database: Database, tmp_path: Path
) -> None:
    first = start(database, tmp_path)
    work(database, tmp_path, first)
    second = start(database, tmp_path, name="other")
    work(database, tmp_path, second)
    with database.read() as session:
        target = select(RunPrompt.prompt_id).where(RunPrompt.role == Role.TARGET).limit(1)
        lost = session.scalars(target).one()
    fail(database, Response, "server_error: HTTP 503", prompt_id=lost)
    retry_rows(database, first, "server_error")
    cancel(database, first)

    for _ in range(2):  # nothing is missing the second time
        with database.write() as session:
            pipeline.resume(session, session.get_one(Run, second), actor="me")
        work(database, tmp_path, second)
        require_complete(database, second)
        assert count(database, Response, Response.prompt_id == lost, Response.text.is_not(None)) == 1


def test_a_second_run_on_the_same_teachers_generates_only_what_is_new(database: Database, tmp_path: Path) -> None:
    first = start(database, tmp_path)
    work(database, tmp_path, first)
    before = count(database, Response)

    second = start(database, tmp_path, name="again")
    watching = Watching()
    work(database, tmp_path, second, watching)

    require_complete(database, second)
    assert count(database, Response) == before
    assert set(watching.saves) == {"assign"}
    assert run_of(database, second).router_id == run_of(database, first).router_id


@POSTGRESQL
def test_a_new_teacher_answers_its_own_calibration_cells_and_nobody_elses(database: Database, tmp_path: Path) -> None:
    work(database, tmp_path, start(database, tmp_path, teachers=("ada", "bob")))
    responses, scores = count(database, Response), count(database, Score)

    second = start(database, tmp_path, name="wider", teachers=("ada", "bob", "cyd"))
    with database.read() as session:
        planned = session.execute(
            select(Teacher.name, func.sum(Job.n_prompts))
            .join(Job, Job.teacher_id == Teacher.id)
            .where(Job.run_id == second)
            .group_by(Teacher.name)
        ).all()
    assert [tuple(row) for row in planned] == [("cyd", 12)]
    work(database, tmp_path, second)

    require_complete(database, second)
    assert count(database, Score) - scores == 2 * 12
    by_others = PROMPTS - 12  # at most: prompts that the new router assigns differently
    assert 12 <= count(database, Response) - responses <= 12 + by_others


@SQLITE
def test_a_second_student_costs_no_response_on_the_grid_and_no_quality_score(
    database: Database, tmp_path: Path
) -> None:
    work(database, tmp_path, start(database, tmp_path))
    responses, scores = count(database, Response), count(database, Score)

    file = write_run(tmp_path, name="other")
    file.write_text(file.read_text().replace('name = "student"\nmodel = "student"', 'name = "tiny"\nmodel = "tiny"'))
    with database.write() as session:
        second = pipeline.start_run(session, run_file.read(file), actor="me").id
        waiting = session.scalars(select(Job.stage).where(Job.run_id == second).distinct()).all()
    assert waiting == ["score"]  # the grid exists
    work(database, tmp_path, second)

    require_complete(database, second)
    assert count(database, Score) - scores == 12 * len(TEACHERS)  # only learnability
    assert count(database, Response) - responses <= PROMPTS - 12  # prompts that another router assigns differently


@POSTGRESQL
def test_each_model_is_loaded_once_per_stage(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path)
    watching = Watching()
    work(database, tmp_path, run_id, watching)
    assert len(watching.loads) <= 2 * len(TEACHERS) + 4  # calibrate, generate; two scorers, fit, assign


@POSTGRESQL
def test_a_model_that_takes_its_time_to_load_is_waited_for(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, prompts=20, options={"load_seconds": 1.5})
    work(database, tmp_path, run_id)
    require_complete(database, run_id)


@SQLITE
def test_a_prompt_that_kills_the_engine_becomes_a_failed_row(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"crash_on": "is 40 plus"})
    work(database, tmp_path, run_id)

    require_complete(database, run_id)
    with database.read() as session:
        failures = session.scalars(select(Response.failure).where(Response.failure.is_not(None))).all()
    assert failures
    assert all(failure.startswith("killed_engine") for failure in failures)
    assert count(database, Response) == 12 * len(TEACHERS) + PROMPTS - 12


@SQLITE
def test_one_engine_is_not_blamed_for_what_another_died_of(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each teacher's only prompt is guilty, and no successful result comes between the two."""
    monkeypatch.setattr(queue, "BACKOFF", timedelta())
    run_id = start(database, tmp_path, prompts=1, teachers=("ada", "bob"), strategy="oracle", options={"crash_on": "?"})
    work(database, tmp_path, run_id)

    assert "no response of the calibration grid has a reward" in str(run_of(database, run_id).error)
    with database.read() as session:
        said = [str(event.detail) for event in session.scalars(select(Event))]
    assert not any("every request kills it" in detail for detail in said)


@SQLITE
def test_an_engine_that_cannot_even_be_started_fails_the_run_and_does_not_end_the_worker(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BACKOFF", timedelta())
    (tmp_path / "logs").write_text("")  # where the engines' logs should be
    run_id = start(database, tmp_path)
    work(database, tmp_path, run_id)

    run = run_of(database, run_id)
    assert run.state is RunState.FAILED
    assert "the engine cannot be started: " in str(run.error)
    assert "File exists" in str(run.error)


@SQLITE
def test_an_engine_that_dies_of_every_prompt_fails_the_run_and_not_the_prompts(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BACKOFF", timedelta())
    run_id = start(database, tmp_path, teachers=("ada", "bob"), options={"crash_on": "What is", "concurrency": 2})
    work(database, tmp_path, run_id)

    run = run_of(database, run_id)
    assert run.state is RunState.FAILED
    assert "the engine loads, but every request kills it: the engine died of SIG" in str(run.error)
    # In each attempt an innocent request may be blamed before the guilty one.
    assert count(database, Response) <= 6
    assert count(database, Load) <= 30  # and not some for every prompt


@POSTGRESQL
def test_a_prompt_that_hangs_the_engine_becomes_a_failed_row(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, prompts=20, options={"hang_on": "is 15 plus", "concurrency": 4})
    work(database, tmp_path, run_id, stall_seconds=1.0)

    require_complete(database, run_id)
    with database.read() as session:
        failures = session.scalars(select(Response.failure).where(Response.failure.is_not(None))).all()
    assert failures
    assert all("was silent for" in failure for failure in failures)


@SQLITE
def test_a_request_that_fails_leaves_the_others_alone(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"fail_every": 5})
    work(database, tmp_path, run_id)
    require_complete(database, run_id)
    assert 0 < count(database, Response, Response.failure.is_not(None)) < count(database, Response) / 2


def hosts_of_this_process() -> list[psutil.Process]:
    """The running engine hosts; one that is just ending has no command line."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
            if "persyn.llm.host" in child.cmdline():
                found.append(child)
    return found


@POSTGRESQL
def test_an_engine_host_killed_from_outside_is_replaced_and_nothing_fails(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"latency_seconds": 0.05, "concurrency": 2})
    killed: list[int] = []

    def kill(stage: str) -> None:
        for host in hosts_of_this_process():
            if stage == "generate" and len(killed) < 2 and host.pid not in killed:
                killed.append(host.pid)
                os.kill(host.pid, signal.SIGKILL)

    work(database, tmp_path, run_id, Watching(kill))

    require_complete(database, run_id)
    assert len(killed) == 2
    assert count(database, Response, Response.failure.is_not(None)) == 0


@SQLITE
def test_a_model_that_does_not_load_fails_the_run_with_the_reason(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BACKOFF", timedelta())
    run_id = start(database, tmp_path, options={"journal": str(tmp_path / "nowhere" / "journal")})
    work(database, tmp_path, run_id)

    run = run_of(database, run_id)
    assert run.state is RunState.FAILED
    assert "nowhere/journal cannot be written: No such file or directory" in run.error
    assert count(database, Job, Job.state == JobState.RUNNING) == 0


@POSTGRESQL
def test_stopping_saves_what_is_finished_and_gives_the_jobs_back(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"latency_seconds": 0.05, "concurrency": 2})
    worker: Worker

    def stop(stage: str) -> None:
        worker.stop.set()

    worker = Worker(database, Settings(str(database.url), tmp_path), run_id=run_id, listener=Watching(stop))
    worker.run()

    done = count(database, Response)
    assert 0 < done < 12 * len(TEACHERS)
    with database.read() as session:
        assert set(session.scalars(select(Job.state))) <= {JobState.QUEUED, JobState.DONE}
        assert max(session.scalars(select(Job.attempts))) == 0  # none counted

    work(database, tmp_path, run_id)
    require_complete(database, run_id)


@SQLITE
def test_a_cancelled_run_stops_and_can_go_on(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"latency_seconds": 0.05, "concurrency": 2})

    def cancel(stage: str) -> None:
        with database.write() as session:
            run = session.get_one(Run, run_id)
            if run.state is RunState.RUNNING:
                pipeline.cancel(session, run, actor="me")

    work(database, tmp_path, run_id, Watching(cancel))
    assert run_of(database, run_id).state is RunState.CANCELLED
    with database.read() as session:
        assert set(session.scalars(select(Job.state))) <= {JobState.CANCELLED, JobState.DONE}

    with database.write() as session:
        pipeline.resume(session, session.get_one(Run, run_id), actor="me")
    work(database, tmp_path, run_id)
    require_complete(database, run_id)


@POSTGRESQL
def test_a_run_cancelled_with_requests_in_flight_does_not_hold_up_the_next(database: Database, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = start(database, tmp_path / "first", name="first", options={"latency_seconds": 0.5, "concurrency": 32})
    second = start(database, tmp_path / "second", name="second", options={"concurrency": 1})

    def cancel(stage: str) -> None:
        with database.write() as session:
            pipeline.cancel(session, session.get_one(Run, first), actor="me")

    settings = Settings(str(database.url), tmp_path, stall_seconds=60)
    Worker(database, settings, listener=Watching(cancel)).run()

    assert run_of(database, first).state is RunState.CANCELLED
    require_complete(database, second)


def test_a_job_that_is_taken_back_is_planned_again(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"latency_seconds": 0.02, "concurrency": 2})
    taken: list[int] = []

    def take(stage: str) -> None:
        if not taken:
            with database.write() as session:
                taken.extend(session.scalars(select(Job.id).where(Job.state == JobState.RUNNING)))
                assert pipeline.cancel_jobs(session, session.get_one(Run, run_id), taken, actor="me") == len(taken)

    work(database, tmp_path, run_id, Watching(take))

    require_complete(database, run_id)
    assert count(database, Job, Job.state == JobState.CANCELLED) == len(taken) > 0


def test_a_worker_that_lost_its_lease_writes_nothing_more(database: Database, tmp_path: Path) -> None:
    run_id = start(database, tmp_path, options={"latency_seconds": 0.02, "concurrency": 2})
    thieves: list[int] = []

    def steal(stage: str) -> None:
        if thieves:
            return
        with database.write() as session:
            running = session.scalars(select(Job).where(Job.state == JobState.RUNNING)).first()
            running.fence += 1  # like another worker's claim
            running.owner = "thief"
            thieves.append(running.id)

    def give_back() -> None:
        while not thieves:
            time.sleep(0.01)
        time.sleep(1)
        written.append(count(database, Response, Response.job_id == thieves[0]))
        with database.write() as session:
            queue.sweep(session, actor="me", dead_owners=("thief",))

    written: list[int] = []
    helper = threading.Thread(target=give_back)
    helper.start()
    work(database, tmp_path, run_id, Watching(steal))
    helper.join()

    require_complete(database, run_id)
    with database.read() as session:
        first = session.scalars(
            select(func.count()).where(Event.job_id == thieves[0], Event.to_state == "done", Event.fence == 1)
        ).one()
    assert first == 0
    assert written[0] < 8  # the job of 8 prompts was not finished under the lost fence


@SQLITE
def test_a_run_whose_job_was_lost_too_often_fails_and_does_not_wait_for_ever(
    database: Database, tmp_path: Path
) -> None:
    run_id = start(database, tmp_path)
    with database.write() as session:
        lost = session.scalars(select(Job)).first()
        lost.state, lost.owner, lost.attempts = JobState.RUNNING, "elsewhere", lost.max_attempts
        lost.lease_until = now(timedelta(seconds=-1))
    work(database, tmp_path, run_id)
    assert "its worker was elsewhere" in run_of(database, run_id).error


@POSTGRESQL
def test_an_engine_that_is_alive_and_gives_no_result_is_replaced_and_its_job_fails_in_the_end(
    database: Database, tmp_path: Path
) -> None:
    run_id = start(database, tmp_path, teachers=("ada", "bob"), options={"latency_seconds": 60})
    seen = Watching()
    work(database, tmp_path, run_id, seen, result_seconds=1.0)

    assert "the engine returned no result for 1 s" in run_of(database, run_id).error
    assert len(seen.loads) >= 3  # a new engine per attempt
    assert count(database, Response) == 0


@POSTGRESQL
def test_an_engine_that_had_nothing_to_do_for_long_is_not_blamed_for_it(database: Database, tmp_path: Path) -> None:
    options = {"latency_seconds": 1.2, "concurrency": 64}
    first = start(database, tmp_path, teachers=("ada", "bob"), options=options, name="first")
    seen = Watching()
    with Worker(database, Settings(str(database.url), tmp_path, result_seconds=2.0), listener=seen) as worker:
        worker.work()
        loaded = seen.loads[-1]
        time.sleep(2.5)
        (tmp_path / "second").mkdir()
        questions = {"prompts": 90, "teachers": ("ada", "bob"), "options": options}
        second = start(database, tmp_path / "second", name="second", **questions)
        worker.work()

    require_complete(database, first)
    require_complete(database, second)
    assert loaded in seen.loads
    with database.read() as session:
        errors = session.scalars(select(Job.error).where(Job.error.is_not(None))).all()
    assert errors == []


@POSTGRESQL
def test_each_model_that_is_loaded_is_noted_with_its_job_its_seconds_and_its_gpus(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 0, H100\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seen = Watching()
    file = write_run(tmp_path)
    file.write_text(file.read_text().replace("gpus = 0", "gpus = 1", 1))  # the first teacher's
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    worker = work(database, tmp_path, run_id, seen)

    with database.read() as session:
        loads = session.execute(select(Load, Job.run_id).join(Job, Job.id == Load.job_id)).all()
        (facts,) = summary.facts(session, session.get_one(Run, run_id)).workers
    assert len(loads) == len([model for model in seen.loads if model]) == facts.loads
    assert {load.owner for load, _ in loads} == {worker.owner} == {facts.worker}
    assert {of_run for _, of_run in loads} == {run_id}
    assert {load.gpus for load, _ in loads} == {"0 H100", None}
    assert all(load.seconds > 0 and (tmp_path / "logs" / load.log).exists() for load, _ in loads)
    assert facts.load_seconds == pytest.approx(sum(load.seconds for load, _ in loads))
    assert facts.load_seconds < facts.work_seconds


def test_two_workers_share_a_run_and_do_nothing_twice(database: Database, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run_id = start(
        database, tmp_path, prompts=120, options={"latency_seconds": 0.01, "concurrency": 4, "journal": str(journal)}
    )
    workers = [Worker(database, Settings(str(database.url), tmp_path), run_id=run_id) for _ in range(2)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    require_complete(database, run_id)
    assert len(journal.read_text().splitlines()) == 12 * len(TEACHERS) + 120 - 12
