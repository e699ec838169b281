"""Fill a store small enough to know every answer by hand.

Run `first`: teachers ada (1 and 2 dollars per million tokens) and bob (3 and 6), prompts 1 and 2 for calibration, 3 as
the hold-out, 4 to 6 as targets. Run `second` has its own prompt 7, and shares prompt 1 and both teachers.

prompt  ada's response   its scores       bob's response   its scores        assigned to
1       20 tokens, 12    1, -20 nats      40 tokens        0, -20 nats       ada, 0.6 before 0.4
        of reasoning
2       10 tokens        none, failed     failed           -                 ada
3       30 tokens        0.75, -30 nats   20 tokens        0.25, -40 nats    ada, 1 before 0
4       50 tokens, cut,  -                                                   ada, by the router
        20 of reasoning
5       -                                 failed                             bob, by the router
6       -                                 missing                            bob, by the router
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from persyn.db.catalog import Role, Run, RunPrompt
from persyn.db.results import Router, RouterScore, Score
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.db.work import Event, Job, JobState, Load
from tests.factories import (
    digest,
    make_assignment,
    make_job,
    make_prompt,
    make_response,
    make_run,
    make_scorer,
    make_teacher,
)

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def fill(session: Session) -> None:
    """Fill an empty store."""
    ada = make_teacher(session, "ada", price_in=1.0, price_out=2.0, revision="abc", template_hash="t")
    bob = make_teacher(session, "bob", price_in=3.0, price_out=6.0)
    made = make_run(
        session, name="first", teachers=("ada", "bob"), prompts=6, calibration=2, holdout=1, stage="generate"
    )
    run = session.get_one(Run, made.id)
    assert made.prompt_ids == [1, 2, 3, 4, 5, 6]
    _jobs(session, run, ada, bob)
    _grid(session, run, ada, bob)
    _routed(session, run, ada, bob)
    _trained(session, run)
    _second(session, ada)


def _jobs(session: Session, run: Run, ada: int, bob: int) -> None:
    """Job 1 took 30 seconds, job 2 60 with its second worker, job 3 10; job 4 is running."""
    for teacher, queue, stage, seconds in (
        (ada, "vllm.ada", "calibrate", 30),
        (bob, "vllm.bob", "calibrate", 60),
        (ada, "vllm.ada", "generate", 10),
        (bob, "vllm.bob", "generate", None),
    ):
        is_open = seconds is None
        make_job(
            session,
            run.id,
            stage=stage,
            queue=queue,
            teacher_id=teacher,
            n_prompts={"calibrate": 3, "generate": 1 + is_open}[stage],
            state=JobState.RUNNING if is_open else JobState.DONE,
            owner="w2" if teacher == bob else "w1",
            lease_until=NOON if is_open else None,
            fence=2 if queue == "vllm.bob" and not is_open else 1,
            started_at=NOON,
            finished_at=None if is_open else NOON + timedelta(seconds=seconds),
        )
    session.get_one(Job, 2).error = "the engine ended"
    for number, (actor, was, state, fence) in enumerate(
        (
            ("w1", "queued", "running", 1),
            ("dispatch", "running", "queued", 1),
            ("w2", "queued", "running", 2),
            ("w2", "running", "done", 2),
        )
    ):
        at = NOON + timedelta(seconds=number)
        session.add(Event(at=at, actor=actor, run_id=run.id, job_id=2, from_state=was, to_state=state, fence=fence))
        session.flush()
    session.add_all(
        (
            Load(run_id=run.id, job_id=1, at=NOON, owner="w1", engine="v 1", seconds=4, gpus="0 H100", log="1.log"),
            Load(run_id=run.id, job_id=2, at=NOON, owner="w1", engine="v 1", seconds=5, log="2.log"),
            Load(run_id=run.id, job_id=2, at=NOON, owner="w2", engine="v 1", seconds=7, log="3.log"),
        )
    )


def _grid(session: Session, run: Run, ada: int, bob: int) -> None:
    one = _response(session, 1, ada, 20, job_id=1, seed=7, reasoning="Hm.", reasoning_tokens=12)
    two = _response(session, 1, bob, 40, job_id=2)
    three = _response(session, 2, ada, 10, job_id=1)
    make_response(session, 2, bob, None, failure="too_long: 900 tokens", job_id=2)
    five = _response(session, 3, ada, 30, job_id=1)
    six = _response(session, 3, bob, 20, job_id=2)
    for response, quality, nats, tokens in (
        (one, 1.0, -20.0, 20),
        (two, 0.0, -20.0, 40),
        (five, 0.75, -30.0, 30),
        (six, 0.25, -40.0, 20),
    ):
        session.add(Score(response_id=response, scorer_id=run.quality_scorer_id, value=quality, detail={}))
        session.add(
            Score(response_id=response, scorer_id=run.learnability_scorer_id, value=nats, n_tokens=tokens, detail={})
        )
    failed = {"failure": "not_finite: the score is nan", "detail": {}}
    session.add(Score(response_id=three, scorer_id=run.learnability_scorer_id, **failed))


def _routed(session: Session, run: Run, ada: int, bob: int) -> None:
    router = Router(
        fingerprint=digest("router"),
        backbone="backbone",
        tune="head",
        options={},
        teacher_ids=[ada, bob],
        metrics={},
        path="routers/x",
        sha256=digest("files"),
    )
    session.add(router)
    session.flush()
    run.router_id = router.id
    for prompt, of_ada, of_bob in ((3, 1.0, 2.0), (4, 1.5, -0.5), (5, 0.1, 0.3), (6, -1.0, 1.0)):
        for teacher, score in ((ada, of_ada), (bob, of_bob)):
            session.add(RouterScore(router_id=router.id, prompt_id=prompt, teacher_id=teacher, score=score))
    make_assignment(session, run.id, 1, ada, reason="calibration", score=0.6, margin=0.2)
    make_assignment(session, run.id, 2, ada, reason="calibration", score=0.0)
    make_assignment(session, run.id, 3, ada, reason="calibration", score=1.0, margin=1.0)
    make_assignment(session, run.id, 4, ada, score=1.5, margin=2.0)
    make_assignment(session, run.id, 5, bob, score=0.3, margin=0.2)
    make_assignment(session, run.id, 6, bob, score=1.0, margin=2.0)
    _response(session, 4, ada, 50, job_id=3, finish_reason="length", reasoning="Hm.", reasoning_tokens=20)
    make_response(session, 5, bob, None, failure="empty", job_id=4)


def _second(session: Session, ada: int) -> None:
    made = make_run(session, name="second", teachers=("ada", "bob"), prompts=1, stage="calibrate")
    session.add(RunPrompt(run_id=made.id, prompt_id=1, role=Role.TARGET))
    session.flush()
    make_assignment(session, made.id, 1, ada, reason="strong")
    _response(session, made.prompt_ids[0], ada, 1000)


def _trained(session: Session, run: Run) -> None:
    """The student answers one of two test prompts before training and both after; one then has 2 nats per token."""
    training = Training(
        run_id=run.id,
        student_id=run.student_id,
        fingerprint=digest("training"),
        dataset_hash=digest("dataset"),
        settings={},
        notes={},
        path="students/first",
        revision="sha256:x",
        created_at=NOON,
    )
    session.add(training)
    session.flush()

    prompts = [make_prompt(session, f"test {number}?", source="test.jsonl") for number in range(2)]
    quality = make_scorer(session, "fake")
    for training_id, scorer_id, outcomes in (
        (None, quality, ((0.0, None, None), (1.0, None, None))),
        (training.id, quality, ((1.0, None, None), (1.0, None, None))),
        (training.id, run.learnability_scorer_id, ((-12.0, 6, None), (None, None, "too_long"))),
    ):
        evaluation = Evaluation(
            fingerprint=digest(f"evaluation {training_id} {scorer_id}"),
            student_id=run.student_id,
            training_id=training_id,
            scorer_id=scorer_id,
            name="test.jsonl",
            prompts_hash=digest("prompts"),
            how={},
        )
        session.add(evaluation)
        session.flush()
        for prompt, (value, tokens, failure) in zip(prompts, outcomes, strict=True):
            session.add(
                Outcome(evaluation_id=evaluation.id, prompt_id=prompt, value=value, n_tokens=tokens, failure=failure)
            )


def _response(session: Session, prompt: int, teacher: int, tokens: int, **columns: object) -> int:
    return make_response(
        session, prompt, teacher, f"Answer to {prompt}.", prompt_tokens=10, response_tokens=tokens, **columns
    )
