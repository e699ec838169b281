"""Teachers behind servers, judges and checkers work side by side, within the limits of their accounts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web
from sqlalchemy import func, select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Job, RateLimit
from persyn.jobs import rate_limits
from persyn.llm.protocols import Failed, Generate, Generated, Judge, ModelSpec, Sampling
from persyn.llm.rates import Cost, Costs, Limits, limits
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.crew import Crew
from tests.chat_server import Server, completion
from tests.one_database import SQLITE
from tests.run_files import write_run

FIVE = ("ada", "bob", "cyd", "dan", "eve")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as server:
        yield server


def begin(database: Database, folder: Path, server: Server, options: str = "", **run: object) -> int:
    """Start a run whose teachers are on the server."""
    file = write_run(folder, **run)  # type: ignore[arg-type]
    head, *tables = file.read_text().split("[[teachers]]")
    chosen = f'options = {{ base_url = "{server.base_url}"{options} }}'
    tables = [
        table.replace('engine = "fake"\ngpus = 0', 'engine = "openai"').replace("options = {  }", chosen)
        for table in tables
    ]
    file.write_text("[[teachers]]".join([head, *tables]))
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


@SQLITE
def test_five_teachers_behind_servers_are_asked_at_the_same_time(
    database: Database, tmp_path: Path, server: Server
) -> None:
    run_id = begin(database, tmp_path, server, prompts=12, teachers=FIVE, calibration=4)
    waiting: set[str] = set()
    opened = asyncio.Event()

    async def reply(n: int) -> web.StreamResponse:
        waiting.add(server.bodies[n - 1]["model"])
        if len(waiting) == len(FIVE):
            opened.set()
        await asyncio.wait_for(opened.wait(), 30)  # nobody is answered before all five have asked
        return completion("Four.")

    server.reply = reply
    crew = Crew.of_run(database, Settings(str(database.url), tmp_path), run_id)
    assert len(crew.workers) == 1 + len(FIVE)
    crew.run()

    with database.read() as session:
        assert session.get_one(Run, run_id).state is RunState.DONE
        assert session.scalars(select(func.count()).where(Response.failure.is_not(None))).one() == 0
        # A teacher named gpus = 1 (the default) or not: a server needs none here.
        assert session.scalars(select(Job.is_light).where(Job.queue.startswith("openai"), Job.gpus == 0)).all()
        assert session.scalars(select(Job.id).where(Job.queue.startswith("openai"), ~Job.is_light)).all() == []


LIMITS = Limits("account", requests_per_minute=120, tokens_per_minute=None)


def permitted(database: Database, limit: Limits, tokens: int = 0, wanted: int = 100, unused: int = 0) -> int:
    with database.write() as session:
        return rate_limits.take(session, limit, [Cost(1, tokens)] * wanted, unused_tokens=unused)


def let_pass(database: Database, seconds: float) -> None:
    """Make the store believe that time has passed."""
    with database.write() as session:
        for row in session.scalars(select(RateLimit)):
            row.requests_until -= timedelta(seconds=seconds)
            row.tokens_until -= timedelta(seconds=seconds)


def test_what_is_permitted_to_all_workers_together_keeps_to_the_limit(database: Database) -> None:
    # 2 requests a second; 1 second may be used ahead, and the request that goes beyond it.
    began = time.monotonic()
    assert permitted(database, LIMITS) == 3
    assert permitted(database, LIMITS) == 0
    total = 3
    for _ in range(40):  # 20 seconds, asked twice a second
        let_pass(database, 0.5)
        total += permitted(database, LIMITS)
    allowed = 2 * (20 + time.monotonic() - began)
    assert allowed * 0.95 <= total <= allowed + 3
    let_pass(database, 3600)
    assert permitted(database, LIMITS) == 3  # what was not used is not saved up


def test_a_slow_limit_permits_one_request_at_a_time(database: Database) -> None:
    slow = Limits("account", requests_per_minute=3, tokens_per_minute=None)
    assert permitted(database, slow) == 1
    let_pass(database, 15)
    assert permitted(database, slow) == 0
    let_pass(database, 5)
    assert permitted(database, slow) == 1


def test_tokens_are_charged_as_estimated_and_corrected_by_what_was_used(database: Database) -> None:
    by_tokens = Limits("account", requests_per_minute=None, tokens_per_minute=6000)  # 100 a second
    assert permitted(database, by_tokens, tokens=1000) == 1
    assert permitted(database, by_tokens, tokens=1000) == 0  # 10 s ahead
    assert permitted(database, by_tokens, tokens=50, unused=950) == 2  # 0.5 s ahead, then 1 s
    assert permitted(database, by_tokens, tokens=50, unused=-200) == 0


def test_what_a_request_costs_follows_the_responses_so_far() -> None:
    spec = ModelSpec("openai", "m", options={"base_url": "http://h/v1", "tokens_per_minute": 100})
    costs = Costs(spec)
    request = Generate(1, [{"role": "user", "content": "x" * 400}], Sampling(max_tokens=1000), seed=0)

    first = costs.of(request)
    assert costs.used(Generated(1, "", "stop", 120, 30, 0.1)) == 150
    assert costs.used(Generated(1, "", "stop", 120, 50, 0.1)) == 170
    assert costs.used(Failed(1, "no")) is None
    assert costs.used(Generated(1, "", "stop", None, 50, 0.1)) is None

    assert (first.requests, first.tokens - costs.of(request).tokens) == (1, 1000 - 40)
    assert 1100 < first.tokens < 1120  # 400 bytes of text and the JSON around it


def test_an_account_is_its_addresses_its_key_and_its_model() -> None:
    def account(model: str = "m", **options: object) -> str:
        found = limits(ModelSpec("openai", model, options={"requests_per_minute": 5, **options}))
        assert found is not None
        return found.account

    one, other = "http://a/v1", "http://b/v1"
    assert account(base_url=[one, other], concurrency=3) == account(base_url=[other, one])
    judge = {"engine": "openai", "options": {"base_url": one, "requests_per_minute": 5}}
    assert limits(ModelSpec("judge", "m", options=judge)) == limits(
        ModelSpec("openai", "m", options={"base_url": one, "requests_per_minute": 5})
    )
    different = {
        account(base_url=one),
        account(base_url=other),
        account("n", base_url=one),
        account(base_url=one, api_key_env="K"),
    }
    assert len(different) == 4
    assert limits(ModelSpec("openai", "m", options={"base_url": one})) is None
    batches = {"base_url": one, "requests_per_minute": 5, "mode": "batch"}
    assert limits(ModelSpec("openai", "m", options=batches)) is None  # a provider limits batches apart
    assert limits(ModelSpec("vllm", "m")) is None
    assert Costs(ModelSpec("judge", "m", options=judge)).of(Judge(1, [], "four")).requests == 2


@SQLITE
def test_two_workers_of_one_account_keep_to_its_limit_together(
    database: Database, tmp_path: Path, server: Server
) -> None:
    more = ", requests_per_minute = 1200, concurrency = 4"  # 20 a second
    run_id = begin(database, tmp_path, server, more, prompts=44, teachers=("ada", "bob"), calibration=8, job_prompts=2)
    crews = [Crew.of_run(database, Settings(str(database.url), tmp_path), run_id) for _ in range(2)]
    threads = [threading.Thread(target=crew.run) for crew in crews]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with database.read() as session:
        assert session.get_one(Run, run_id).state is RunState.DONE
    by_model: dict[str, list[float]] = {}
    for body, at in zip(server.bodies, server.at, strict=True):
        by_model.setdefault(body["model"], []).append(at)
    assert sum(map(len, by_model.values())) == 44 + 8
    for times in by_model.values():
        # In any period: its length, 1 s ahead and one request; and half a second for delays on the way.
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert last - first + 1 <= 20 * (times[last] - times[first] + 1.5) + 1
