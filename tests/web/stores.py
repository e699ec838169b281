"""Fill a store with an unfinished run, small enough to know every figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from persyn.db.catalog import Prompt, Run, Student, Teacher
from persyn.db.connect import Database
from persyn.db.results import RouterScore, Score
from persyn.db.time import now
from persyn.db.work import Event
from tests.factories import MadeRun, make_assignment, make_job, make_response, make_router, make_run

#: Transforms a text before it is stored.
Spoil = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class MadeStore:
    """A run, the ids needed to look it up, and a failed run."""

    run: MadeRun
    running_job: int
    failed: str = "failed"
    name: str = "maths"


def fill(database: Database, spoil: Spoil = str) -> MadeStore:
    """Create a run "maths" in its last stage: 8 prompts (2 calibration, 2 hold-out, 4 target), teachers ada and bob.

    Three targets are assigned to ada: one is answered, one failed (too_long), one is in progress; bob's is waiting.
    """
    with database.write() as session:
        made = make_run(session, name="maths", teachers=("ada", "bob"), prompts=8, calibration=2, holdout=2)
        run = session.get_one(Run, made.id)
        run.name, run.stage = named(spoil("maths")), "generate"
        for number, teacher_id in enumerate(made.teacher_ids):
            session.get_one(Teacher, teacher_id).name = spoil(("ada", "bob")[number])
        session.get_one(Student, run.student_id).name = spoil("student")
        for number, prompt_id in enumerate(made.prompt_ids):
            prompt = session.get_one(Prompt, prompt_id)
            prompt.text, prompt.source_id = spoil(f"What is {number} plus {number}?"), spoil(f"q-{number}")
            prompt.answer, prompt.source = spoil(str(2 * number)), spoil("prompts.jsonl")
            prompt.meta = {spoil("topic"): spoil("sums"), "deep": {"list": [spoil("x")]}}
            prompt.history = [{"role": spoil("system"), "content": spoil("Be brief.")}] if number == 0 else None
        metrics = {
            "router": {"hit1": 0.75, "hit3": None, "routed_reward": 0.6, "regret": 0.1},
            "static": {"hit1": 0.5, "hit3": None, "routed_reward": 0.55, "regret": 0.15},
        }
        run.router_id = make_router(session, made, backbone=spoil("backbone"), metrics=metrics)
        ada, bob = made.teacher_ids
        grid_job = make_job(
            session, made.id, stage="calibrate", state="done", teacher_id=ada, owner=spoil("vm.1/7/9/aa")
        )
        for prompt_id in made.prompt_ids[:4]:
            for teacher_id, quality, likelihood in ((ada, 1.0, -4.0), (bob, 0.0, -2.0)):
                response_id = make_response(
                    session, prompt_id, teacher_id, spoil(f"It is {quality}."), response_tokens=10, job_id=grid_job
                )
                scored = {"response_id": response_id, "detail": {}}
                session.add(Score(scorer_id=run.quality_scorer_id, value=quality, **scored))
                session.add(Score(scorer_id=run.learnability_scorer_id, value=likelihood, n_tokens=2, **scored))
            make_assignment(session, made.id, prompt_id, ada, reason="calibration", score=0.6, margin=0.2)
        for prompt_id in made.prompt_ids:
            session.add(RouterScore(router_id=run.router_id, prompt_id=prompt_id, teacher_id=ada, score=1.5))
            session.add(RouterScore(router_id=run.router_id, prompt_id=prompt_id, teacher_id=bob, score=-0.25))
        running = make_job(
            session,
            made.id,
            state="running",
            teacher_id=ada,
            n_prompts=3,
            owner=spoil("vm.1/417/9/ab"),
            fence=1,
            heartbeat_at=now(),
            lease_until=now(timedelta(seconds=60)),
            started_at=now(timedelta(seconds=-10)),
        )
        claim = {"at": now(timedelta(seconds=-10)), "job_id": running, "fence": 1, "to_state": "running"}
        session.add(Event(run_id=made.id, actor=spoil("vm.1/417/9/ab"), detail={}, **claim))
        make_job(session, made.id, teacher_id=bob, n_prompts=1, queue=spoil("vllm.bob"), error=spoil("bob fell over"))
        session.add(
            Event(run_id=made.id, job_id=grid_job, actor=spoil("vm.1/7/9/aa"), fence=1, to_state="running", detail={})
        )
        session.add(
            Event(
                run_id=made.id,
                job_id=grid_job,
                actor=spoil("me@desk"),
                to_state="done",
                detail={"why": spoil("it is over")},
            )
        )
        targets = made.prompt_ids[4:]
        for prompt_id, teacher_id, margin in zip(targets, (ada, ada, ada, bob), (0.5, 1.5, -0.25, 0.1), strict=True):
            make_assignment(session, made.id, prompt_id, teacher_id, score=1.0, margin=margin, reason=spoil("router"))
        reasoned = {"reasoning": spoil("Four and four."), "reasoning_tokens": 3}
        make_response(session, targets[0], ada, spoil("Eight."), response_tokens=4, job_id=running, **reasoned)
        make_response(session, targets[1], ada, None, failure=spoil("too_long") + ": 9,213 tokens", job_id=running)

        failed = session.get_one(Run, make_run(session, name="failed", teachers=("cyd", "dot")).id)
        failed.name, failed.state, failed.error = (
            named(spoil("failed")),
            "failed",
            spoil("stage calibrate, job 9: no memory"),
        )
        for number in range(3):
            error = spoil("no memory") if number else spoil("no disk")
            make_job(session, failed.id, stage="calibrate", state="failed", error=error, attempts=3, finished_at=now())
    return MadeStore(made, running, named(spoil("failed")), named(spoil("maths")))


def named(text: str) -> str:
    """Remove slashes, which cannot be part of a run's name."""
    return text.replace("/", "")
