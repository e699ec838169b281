"""The share of the remaining work that a worker claims."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from persyn.db.connect import Database
from persyn.db.work import Job
from persyn.jobs import queue, workload
from persyn.jobs.queue import LEASE
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.claims import Claims
from persyn.workers.runner.ledger import Ledger
from tests.factories import make_run

PROMPTS = 10


def queue_up(database: Database, jobs: int, *, name: str = "vllm.a", gpus: int = 1) -> None:
    row: dict[str, Any] = {"stage": "generate", "first_prompt_id": 1, "last_prompt_id": 9, "n_prompts": PROMPTS}
    with database.write() as session:
        run_id = make_run(session, name=f"{name}-{jobs}", prompts=1).id
        session.add_all(Job(run_id=run_id, queue=name, gpus=gpus, **row) for _ in range(jobs))


def at_work(database: Database, count: int, *, name: str = "vllm.a") -> None:
    """Other workers, each with a job."""
    for n in range(count):
        with database.write() as session:
            assert queue.claim(session, owner=f"other{n}", queue=name) is not None


def claim(database: Database, window: int) -> int:
    """Have a worker choose a queue, load its model and claim jobs; return the number of prompts it holds."""
    ledger = Ledger(("0",))
    owner = ledger.enlist(lambda: False)
    claims = Claims(owner, Reach(("0",)), ledger, run_id=None, lease=LEASE)
    with database.write() as session:
        first = claims.first(session, None, ())
    assert first is not None
    at_hand = PROMPTS
    while not claims.is_enough(at_hand, window):
        with database.write() as session:
            if claims.next(session, first.queue, at_hand, window) is None:
                break
        at_hand += PROMPTS
    return at_hand


def test_a_worker_alone_claims_what_its_engine_takes(database: Database) -> None:
    queue_up(database, 100)

    assert claim(database, 300) == 300


def test_of_little_that_is_left_a_worker_claims_its_share(database: Database) -> None:
    queue_up(database, 64)
    at_work(database, 7)

    assert claim(database, 2048) == 64 * PROMPTS // 8


def test_an_engine_is_filled_and_others_have_the_rest(database: Database) -> None:
    queue_up(database, 100)
    at_work(database, 1)

    # Its share is 500: more than the 100 that fill the engine; half of it exceeds the 200 that the engine accepts.
    assert claim(database, 200) == 200
    with database.write() as session:
        assert workload.share(session, on_gpus=True) == 500


def test_what_fills_the_engine_is_more_than_half_a_share(database: Database) -> None:
    queue_up(database, 24)
    at_work(database, 1)

    assert claim(database, 200) == 100


def test_the_share_is_of_all_models_of_that_kind(database: Database) -> None:
    queue_up(database, 40)
    queue_up(database, 40, name="vllm.b")
    queue_up(database, 40, name="math", gpus=0)
    at_work(database, 3)
    at_work(database, 1, name="math")

    assert claim(database, 2048) == 80 * PROMPTS // 4
    with database.write() as session:
        assert workload.share(session, on_gpus=False) == 40 * PROMPTS


def test_a_worker_that_was_at_work_just_now_has_a_share_of_the_next_stage(database: Database) -> None:
    queue_up(database, 1, name="vllm.z")
    with database.write() as session:
        job = queue.claim(session, owner="other")
        assert job is not None
        assert queue.hold(session, job)
        assert queue.complete(session, job, owner="other")
    queue_up(database, 40)

    assert claim(database, 2048) == 40 * PROMPTS // 2


@pytest.mark.parametrize(("jobs", "held"), [(1, 10), (2, 20)])
def test_the_last_jobs_are_claimed_by_whoever_comes(database: Database, jobs: int, held: int) -> None:
    queue_up(database, jobs)

    assert claim(database, 2048) == held
    with database.read() as session:
        assert session.scalar(select(func.count()).where(Job.state == "queued")) == 0
