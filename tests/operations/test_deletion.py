"""A deleted run takes with it what only it has; other runs keep what they share, also when the deletion is killed."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

import persyn
from persyn.analysis.audit import audit
from persyn.db.base import Base
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunState, RunTeacher
from persyn.db.connect import Database
from persyn.db.results import Fallback, Origin, Response, Router, RouterScore, Score
from persyn.db.time import now
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.db.work import Batch, Event, Job
from persyn.errors import UsageError
from persyn.jobs import queue
from persyn.operations import deletion
from persyn.operations.deletion import Deletion, DeletionOptions, delete_run
from persyn.runs import pipeline
from tests.factories import (
    MadeRun,
    digest,
    make_assignment,
    make_job,
    make_response,
    make_router,
    make_run,
    make_scorer,
)


def fill(database: Database, home: Path) -> tuple[MadeRun, MadeRun]:
    """Two runs with the teacher b, and b's responses to a shared prompt; the first has everything a run can have."""
    with database.write() as session:
        one, other = make_run(session, name="one"), make_run(session, name="other", teachers=("b", "c"))
        a, b = one.teacher_ids
        shared = other.prompt_ids[0]
        session.add(RunPrompt(run_id=one.id, prompt_id=shared, role=Role.TARGET))
        job = make_job(session, one.id, teacher_id=a, first_prompt_id=1, last_prompt_id=99)
        for teacher_id in (a, b):
            for prompt_id in (*one.prompt_ids, shared):
                response = make_response(session, prompt_id, teacher_id, job_id=job if teacher_id == a else None)
                session.add(Score(response_id=response, scorer_id=make_scorer(session, "fake"), value=1.0, detail={}))
        session.execute(update(Response).where(Response.prompt_id == one.prompt_ids[0]).values(origin=Origin.IMPORTED))
        for run in (one, other):
            make_assignment(session, run.id, run.prompt_ids[0], b)
            passed = {"prompt_id": run.prompt_ids[0], "choice": 1, "teacher_id": b, "reason": "x", "sample": 0}
            session.add(Fallback(run_id=run.id, cause="refused", failure="refused", **passed))
        session.add(Event(actor="me", run_id=one.id, to_state="running", detail={}))
        router_id = make_router(session, one, path="routers/mine-1")
        session.add_all(RouterScore(router_id=router_id, prompt_id=p, teacher_id=a, score=0.0) for p in one.prompt_ids)
        session.get_one(Run, one.id).router_id = router_id
        _train(session, one, home)
    for folder in ("routers/mine-1", "datasets/one", "datasets-preference/one", "datasets/other"):
        (home / folder).mkdir(parents=True)
        (home / folder / "file").touch()
    return one, other


def _train(session: Any, run: MadeRun, home: Path) -> None:
    (home / "students" / "one").mkdir(parents=True)
    student_id = session.get_one(Run, run.id).student_id
    training = Training(
        run_id=run.id,
        student_id=student_id,
        fingerprint=digest("t"),
        dataset_hash=digest("d"),
        settings={},
        notes={},
        path=str(home / "students" / "one"),
        revision="sha256:0",
    )
    session.add(training)
    session.flush()
    for name, training_id in (("after", training.id), ("before", None)):
        evaluation = Evaluation(
            fingerprint=digest(name),
            student_id=student_id,
            training_id=training_id,
            scorer_id=make_scorer(session, "fake"),
            name=name,
            prompts_hash=digest("p"),
            how={},
        )
        session.add(evaluation)
        session.flush()
        session.add(Outcome(evaluation_id=evaluation.id, prompt_id=run.prompt_ids[0]))


def counts(database: Database) -> dict[str, int]:
    with database.read() as session:
        tables = Base.metadata.sorted_tables
        return {table.name: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}


def delete(database: Database, run: MadeRun, home: Path, progress: Any = lambda *_: None, **options: Any) -> Deletion:
    given = DeletionOptions(**options)
    return delete_run(database, run.id, home, actor="me", options=given, progress=progress)


def test_a_deleted_run_leaves_what_others_may_need(database: Database, tmp_path: Path) -> None:
    one, other = fill(database, tmp_path)
    before = counts(database)

    found = delete(database, one, tmp_path)

    gone = {name: before[name] - rows for name, rows in counts(database).items() if rows != before[name]}
    own = {"runs": 1, "routers": 1, "router_scores": 10, "run_teachers": 2, "run_prompts": 11, "assignments": 1}
    own["fallbacks"] = 1
    assert gone == own | {"jobs": 1, "events": 1, "trainings": 1, "evaluations": 1, "outcomes": 1}
    assert found.deleted == {
        **{"run_prompts": 11, "assignments": 1, "fallbacks": 1, "router_scores": 10, "outcomes": 1},
        **{"jobs": 1, "events": 2, "routers": 1},  # and the event of the deletion itself
    }
    assert found.kept_responses == 22
    assert (found.keeps_router, found.checkpoints) == (False, [tmp_path / "routers" / "mine-1"])
    assert not (tmp_path / "routers" / "mine-1").exists()
    kept = ["datasets/one", "datasets-preference/one", "students/one"]
    assert sorted(found.kept_folders) == sorted(tmp_path / folder for folder in kept)
    assert all((tmp_path / folder).is_dir() for folder in (*kept, "datasets/other"))
    with database.read() as session:
        assert set(session.scalars(select(Response.job_id))) == {None}
        assert [each.rule for each in audit(session, session.get_one(Run, other.id))] == []


def test_responses_that_no_other_run_needs_are_deleted_on_request(database: Database, tmp_path: Path) -> None:
    one, _ = fill(database, tmp_path)
    a, b = one.teacher_ids

    found = delete(database, one, tmp_path, responses=True)

    with database.read() as session:
        left = session.execute(select(Response.teacher_id, Prompt.text).join(Prompt).order_by(Response.id)).all()
        assert len(session.scalars(select(Score.response_id)).all()) == 3
    # Those that were imported, and b's to the prompt that the other run has, too: it does not have a.
    assert [tuple(row) for row in left] == [
        (a, "one: prompt 0?"),
        (b, "one: prompt 0?"),
        (b, "other: prompt 0?"),
    ]
    assert (found.deleted["responses"], found.kept_responses) == (19, 3)


def test_a_router_that_another_run_has_is_kept(database: Database, tmp_path: Path) -> None:
    one, other = fill(database, tmp_path)
    with database.write() as session:
        router_id = session.get_one(Run, one.id).router_id
        session.get_one(Run, other.id).router_id = router_id
        was = session.scalars(select(Router.fingerprint)).one()

    found = delete(database, one, tmp_path)

    assert (found.keeps_router, found.checkpoints) == (True, [])
    assert (tmp_path / "routers" / "mine-1").is_dir()
    assert counts(database)["router_scores"] == 10
    with database.read() as session:
        assert session.scalars(select(Router.fingerprint)).one() == was


def test_routers_of_earlier_calibrations_go_too_but_not_one_that_another_run_has(
    database: Database, tmp_path: Path
) -> None:
    one, other = fill(database, tmp_path)
    with database.write() as session:
        earlier, shared = (make_router(session, one, fingerprint=digest(name)) for name in ("earlier", "shared"))
        session.get_one(Run, other.id).router_id = shared
        for number, router_id in enumerate((earlier, shared), 1):
            begun = {"number": number, "prompts": 1, "of_extensions": 0, "reopened": 0, "router_id": router_id}
            session.add(Event(actor="me", run_id=one.id, to_state="running", detail={"recalibrated": begun}))

    delete(database, one, tmp_path)

    with database.read() as session:
        assert session.scalars(select(Router.id)).all() == [shared]


def test_of_two_runs_that_are_deleted_at_once_the_last_takes_the_router(database: Database, tmp_path: Path) -> None:
    one, other = fill(database, tmp_path)
    with database.write() as session:
        session.get_one(Run, other.id).router_id = session.get_one(Run, one.id).router_id

    def meanwhile(what: str, total: int, done: int) -> None:
        if what == "prompts":
            delete(database, other, tmp_path)

    delete(database, one, tmp_path, progress=meanwhile)

    assert not (tmp_path / "routers" / "mine-1").exists()
    after = counts(database)
    assert [after[name] for name in ("runs", "routers", "router_scores")] == [0, 0, 0]


def test_an_imported_router_is_kept(database: Database, tmp_path: Path) -> None:
    one, _ = fill(database, tmp_path)
    with database.write() as session:
        session.execute(update(Router).values(learned={"teachers": []}))

    found = delete(database, one, tmp_path)

    assert (found.keeps_router, found.checkpoints) == (True, [])
    assert (tmp_path / "routers" / "mine-1").is_dir()
    assert (counts(database)["routers"], counts(database)["router_scores"]) == (1, 10)


def test_a_run_that_is_started_during_a_deletion_keeps_the_responses_it_needs(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "_PROMPTS", 4)
    one, _ = fill(database, tmp_path)
    late = one.prompt_ids[8]

    def meanwhile(what: str, total: int, done: int) -> None:
        if done == 4:
            with database.write() as session:
                new = make_run(session, name="new", prompts=0)
                session.add(RunPrompt(run_id=new.id, prompt_id=late, role=Role.TARGET))

    delete(database, one, tmp_path, responses=True, progress=meanwhile)

    with database.read() as session:
        left = session.scalars(select(Response.teacher_id).where(Response.prompt_id == late)).all()
    assert sorted(left) == sorted(one.teacher_ids)


def test_batches_that_a_provider_may_bill_are_not_lost_silently(database: Database, tmp_path: Path) -> None:
    one, _ = fill(database, tmp_path)
    with database.write() as session:
        job = session.scalars(select(Job.id)).one()
        for key, provider_id, collected in (("k1", "batch_1", None), ("k2", None, None), ("k3", "batch_3", now())):
            batch = {"place": digest("p"), "requests": 9, "finished": 0, "provider_id": provider_id}
            session.add(Batch(key=key, job_id=job, collected_at=collected, **batch))
    with pytest.raises(
        UsageError, match=r"batches of run one that were not collected, 2: batch_1, with key k2; .* resume"
    ):
        delete(database, one, tmp_path)
    assert counts(database)["runs"] == 2
    delete(database, one, tmp_path, abandon_batches=True)
    assert (counts(database)["runs"], counts(database)["batches"]) == (1, 0)


def test_a_run_that_was_deleted_elsewhere_is_named(database: Database, tmp_path: Path) -> None:
    one, _ = fill(database, tmp_path)
    with persyn.open(database.url.render_as_string(hide_password=False), home=tmp_path) as store:
        run = store.run("one")
        delete(database, one, tmp_path)
        for use in (run.cancel, run.pause, run.resume, lambda: run.priority, run.delete, lambda: run.rename("two")):
            with pytest.raises(UsageError, match=r"run .*is no longer in the store"):
                use()


@pytest.mark.parametrize("steps", [1, 8, 12])
def test_a_deletion_that_is_interrupted_goes_on(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    for name in ("_PROMPTS", "_JOBS", "_ROWS"):
        monkeypatch.setattr(deletion, name, 2)
    one, other = fill(database, tmp_path)
    left = steps

    def stop(what: str, total: int, done: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delete(database, one, tmp_path, progress=stop)

    with database.write() as session:
        run = session.get_one(Run, one.id)
        assert run.state is RunState.DELETING
        assert queue.claim(session, owner="w", run_id=run.id) is None
        for use in (pipeline.resume, pipeline.cancel):
            with pytest.raises(UsageError, match="run one is being deleted; 'persyn run delete one' finishes that"):
                use(session, run, actor="me")
    delete(database, one, tmp_path, responses=True)
    after = counts(database)
    assert {name: after[name] for name in ("runs", "routers", "router_scores", "jobs", "trainings")} == {
        **{"runs": 1, "routers": 0, "router_scores": 0, "jobs": 0, "trainings": 0}
    }
    assert after["run_prompts"] == 10
    with database.read() as session:
        assert session.scalars(select(RunTeacher.run_id).distinct()).all() == [other.id]


def test_a_run_is_not_deleted_while_a_worker_holds_a_job_of_it(database: Database, tmp_path: Path) -> None:
    one, _ = fill(database, tmp_path)
    with database.write() as session:
        assert queue.claim(session, owner="far/1/2/x") is not None
    with pytest.raises(UsageError, match=r"far:1 holds jobs of run one; pause it, .*: persyn run pause one"):
        delete(database, one, tmp_path)
    assert counts(database)["runs"] == 2
    with database.write() as session:
        session.execute(update(Job).values(lease_until=now(timedelta(seconds=-1))))
    delete(database, one, tmp_path)
    assert counts(database)["runs"] == 1


def test_a_folder_outside_the_checkpoints_is_never_removed(database: Database, tmp_path: Path) -> None:
    one, _ = fill(database, tmp_path)
    (tmp_path / "precious").mkdir()
    with database.write() as session:
        session.execute(update(Router).values(path="routers/../precious"))
    assert delete(database, one, tmp_path).checkpoints == []
    assert (tmp_path / "precious").is_dir()
