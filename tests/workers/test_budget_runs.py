"""A run stops before it would exceed its budget, goes on when it is raised, and says how far off its plan was."""

from __future__ import annotations

import json
import shutil
import threading
import time
import tomllib
from collections import Counter, deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import func, select, update

from persyn.analysis import spending
from persyn.cli.main import persyn
from persyn.cli.run import EXIT_PAUSED
from persyn.config import load_config
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.spending import Expense, Place, Price
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, RateLimit
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Tariff
from persyn.llm.protocols import ModelSpec
from persyn.llm.rates import Usage
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.stages.registry import STAGES
from persyn.workers.runner.listener import Listener
from persyn.workers.runner.purse import Purse
from persyn.workers.runner.slot import Flight, OpenJob
from persyn.workers.runner.transactions import Transactions
from persyn.workers.runner.worker import Worker
from tests.batch_server import BatchServer, answered
from tests.chat_server import Server
from tests.factories import make_run
from tests.run_files import TEACHERS, write_run

#: Words, which are the fake engine's tokens: 5 of a prompt, 12 of a response.
TOKENS = 5 + 12


@pytest.fixture
def store(tmp_path: Path, migrated: Path) -> Database:
    shutil.copy(migrated, tmp_path / "persyn.db")
    return Database(f"sqlite:///{tmp_path / 'persyn.db'}")


def start(store: Database, file: Path) -> int:
    with store.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def short_run(folder: Path, **run: Any) -> tuple[Path, str]:
    """A run file whose responses have at most 20 tokens, and its text."""
    file = write_run(folder, **run)
    return file, file.read_text().replace("options = {", "sampling = { max_tokens = 20 }\noptions = {")


def work(store: Database, folder: Path, budget: str, *, price_in: float = 1.0, **run: Any) -> int:
    """Start a run with this budget, or start it again, and work it until it has stopped."""
    file = write_run(folder, **run)
    more = f"price_in = {price_in}\nprice_out = 10.0\nsampling = {{ max_tokens = 20 }}\noptions = {{"
    file.write_text(file.read_text().replace("options = {", more) + budget)
    run_id = start(store, file)
    spending.record(store, run_id, is_start=True)
    Worker(store, Settings.from_environment({"PERSYN_HOME": str(folder / "home")}), run_id=run_id).run()
    return run_id


def test_a_run_stops_below_its_budget_and_goes_on_when_it_is_raised(
    store: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = work(store, tmp_path, "[budget]\ntokens = 900\n")
    with store.read() as session:
        run = session.get_one(Run, run_id)
        found = spending.facts(session, run)
        assert (run.state, run.stage) == (RunState.PAUSED, "generate")
        assert str(run.error).startswith("budget: tokens of the run are used up: ")
        (standing,) = found.budget
        assert (standing.limit, standing.held) == (900, 0)
        assert 900 - 2 * 145 < standing.spent <= 900  # no request takes more than 145 tokens by its estimate
        needed = (len(TEACHERS) * 12 + 48) * TOKENS
        assert found.rest is not None
        assert found.rest.tokens == pytest.approx(needed - standing.spent, rel=0.05)
    monkeypatch.setenv("PERSYN_DATABASE_URL", f"sqlite:///{tmp_path / 'persyn.db'}")
    said = CliRunner().invoke(persyn, ["run", "watch", "test"])
    assert said.exit_code == EXIT_PAUSED
    assert "raise [budget] in the run's file" in said.output

    assert work(store, tmp_path, "[budget]\ntokens = 5000\n", price_in=2.0) == run_id
    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.error) == (RunState.DONE, None)
        counted = select(func.sum(Expense.requests)).where(Expense.teacher_id.is_not(None))
        assert session.scalars(counted).one() == session.scalars(select(func.count(Response.id))).one()
        changes = [detail["changed"] for detail in session.scalars(select(Event.detail)) if "changed" in detail]
        assert changes == [[{"key": "budget.tokens", "was": 900, "now": 5000}]]
        # What was spent before the price changed keeps the old one.
        found = spending.facts(session, run)
        assert found.spent.tokens == needed
        before, after = (each[0] for each in _usd_by_price(session, run_id))
        assert found.spent.usd == pytest.approx(before + after)
        assert sorted(session.scalars(select(Price.usd).distinct())) == [1.0, 2.0, 10.0]
        generated = [model for model in found.models if model.stage == "generate"]
        assert all(abs(model.off["tokens"]) < 0.1 for model in generated)
    assert "off" in CliRunner().invoke(persyn, ["run", "status", "test"]).output

    again = work(store, tmp_path, "[budget]\ntokens = 1\n", name="again")
    with store.read() as session:
        assert session.get_one(Run, again).state is RunState.DONE  # all responses are reused
        assert not session.scalars(
            select(Expense.requests).join(Job).where(Job.run_id == again, Job.teacher_id > 0)
        ).all()


def _usd_by_price(session: Any, run_id: int) -> list[tuple[float]]:
    """What responses cost before and after the first price, by hand: $1 or $2 in, $10 out per million."""
    rows = session.execute(select(Expense.prompt_tokens, Expense.response_tokens, Expense.usd)).all()
    old = [(p + 10 * r) / 1e6 for p, r, usd in rows if usd is not None and usd == pytest.approx((p + 10 * r) / 1e6)]
    new = [(2 * p + 10 * r) / 1e6 for p, r, usd in rows if usd and usd == pytest.approx((2 * p + 10 * r) / 1e6)]
    assert old
    assert new
    return [(sum(old),), (sum(new),)]


def test_failed_requests_count_and_a_teacher_without_budget_leaves_the_others_at_work(
    store: Database, tmp_path: Path
) -> None:
    run_id = work(
        store,
        tmp_path,
        "[budget.teachers.ada]\ntokens = 1\n",
        options={"fail_every": 5},
        prompts=16,
        calibration=8,
    )
    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.stage) == (RunState.PAUSED, "calibrate")
        assert "tokens of teacher ada" in str(run.error)
        spent = expenses.amounts(session, run_id)
        names = expenses.teacher_names(session, run_id, load_config(run.config))
        requests = {names[key[1]]: amount.requests for key, amount in spent.items() if key[1] is not None}
        assert {name: requests.get(name, 0) for name in TEACHERS} == {"ada": 0, "bob": 8, "cyd": 8}


def batch_run(folder: Path, server: BatchServer, budget: str) -> Path:
    """A run of two teachers that answer at random, in batches of at most 4 requests."""
    file = write_run(folder, prompts=12, teachers=("ada", "bob"), strategy="random")
    options = {"base_url": server.base_url, "mode": "batch", "batch_requests": 4, "poll_seconds": 0.05}
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    text = file.read_text().replace('engine = "fake"\ngpus = 0\nfamily', 'engine = "openai"\ngpus = 0\nfamily')
    text = text.replace("options = {  }", f"sampling = {{ max_tokens = 20 }}\noptions = {{ {inline} }}")
    file.write_text(text + budget)
    return file


@pytest.mark.parametrize("tokens", [1, 600])
def test_a_batch_that_does_not_fit_the_budget_pauses_the_run(store: Database, tmp_path: Path, tokens: int) -> None:
    with BatchServer.running() as server:
        run_id = start(store, batch_run(tmp_path, server, f"[budget]\ntokens = {tokens}\n"))
        worker = Worker(store, Settings.from_environment({"PERSYN_HOME": str(tmp_path / "home")}), run_id=run_id)
        alarm = threading.Timer(60.0, worker.stop.set)
        alarm.start()
        worker.run()
        alarm.cancel()
        sent = len(server.sent)
    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.PAUSED
        assert ", and the next batch may take " in str(run.error)
        spent = list(expenses.amounts(session, run_id).values())
    assert bool(sent) is (tokens > 1)
    assert (sum(each.requests for each in spent), sum(each.tokens for each in spent)) == (sent, 9 * sent)
    assert not any(each.held for each in spent)


def test_an_unusable_answer_in_a_batch_may_be_charged(store: Database, tmp_path: Path) -> None:
    unusable = answered("")
    unusable["response"]["body"]["choices"][0]["finish_reason"] = None
    asked: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        asked[question] += 1
        return unusable if question.startswith("What is 3 ") and asked[question] < 3 else answered("Four.")

    with BatchServer.running() as server:
        server.reply = reply
        run_id = start(store, batch_run(tmp_path, server, ""))
        Worker(store, Settings.from_environment({"PERSYN_HOME": str(tmp_path / "home")}), run_id=run_id).run()
    with store.read() as session:
        assert session.get_one(Run, run_id).state is RunState.DONE
        assert session.scalars(select(func.sum(Expense.repeats))).one() == 2


def test_a_run_that_waits_for_its_budget_uses_no_permits_of_the_provider(store: Database, tmp_path: Path) -> None:
    with Server.running() as server:
        options = {"base_url": server.base_url, "requests_per_minute": 60, "max_retries": 0}
        file, text = short_run(tmp_path, engine="openai", options=options)
        file.write_text(f"{text}[budget]\ntokens = 1000\n")
        run_id = start(store, file)
        with store.write() as session:  # another worker has nearly all of it in flight
            claim = queue.claim(session, owner="other", run_id=run_id)
            assert claim is not None
            tariff = Tariff(Place.SERVER, has_budget=True)
            assert expenses.admit(session, claim, tariff, [Usage(990, 0)]) == (1, None)
        settings = Settings.from_environment({"PERSYN_HOME": str(tmp_path / "home")})

        class Stopping(Listener):
            def loaded(self, spec: ModelSpec, seconds: float) -> None:
                threading.Timer(1.0, worker.stop.set).start()

        worker = Worker(store, settings, run_id=run_id, listener=Stopping())
        worker.run()
        assert not server.bodies
    with store.read() as session:
        assert session.scalars(select(RateLimit.account)).all() == []
        assert session.get_one(Run, run_id).state is RunState.RUNNING


def test_a_broken_engine_of_a_lost_job_is_not_counted_again(store: Database, tmp_path: Path) -> None:
    file, text = short_run(tmp_path)
    file.write_text(f"{text}[budget]\ntokens = 1_000_000\n")
    run_id = start(store, file)
    worker = Worker(store, Settings.from_environment({"PERSYN_HOME": str(tmp_path / "home")}), run_id=run_id)
    server, one = Tariff(Place.SERVER, has_budget=True), Usage(100, 20)
    with store.write() as session:
        claims = [queue.claim(session, owner=worker.owner, run_id=run_id) for _ in range(2)]
        loaded = [STAGES[claim.stage].load(session, claim) for claim in claims if claim is not None]
        jobs = [
            OpenJob(claim, batch.spec, deque(), server)
            for claim, batch in zip(claims, loaded, strict=True)
            if claim is not None
        ]
        # The requests of two jobs in turn, as when an engine has room for one at a time.
        flights = [Flight(job, batch.requests[n]) for n in (0, 1) for job, batch in zip(jobs, loaded, strict=True)]
        for job in jobs:
            job.held = {flight.request.id: one for flight in flights if flight.job is job}
            assert expenses.admit(session, job.claim, server, list(job.held.values()))[0] == 2
        session.execute(update(Job).values(lease_until=now(timedelta(seconds=-1))))
        assert len(queue.sweep(session, actor="me")) == 2
        before = expenses.amounts(session, run_id)
        assert sum(each.lost for each in before.values()) == 4
    purse = Purse(Transactions(store, alive=lambda: None, pause=time.sleep), queue.LEASE)
    purse.turn_to(jobs[0].spec)
    purse.break_off(flights, None)
    assert not any(job.held for job in jobs)
    with store.read() as session:
        assert expenses.amounts(session, run_id) == before


def test_a_raised_budget_reaches_a_teacher_that_was_halted_while_others_work(store: Database, tmp_path: Path) -> None:
    file, text = short_run(tmp_path)
    file.write_text(f"{text}[budget.teachers.ada]\ntokens = 1\n")
    run_id = start(store, file)
    with store.write() as session:
        claim = queue.claim(session, owner="me", run_id=run_id)
        assert claim is not None
        pipeline.halt(session, claim, "budget: tokens of teacher ada are used up", owner="me")
        assert session.get_one(Run, run_id).state is RunState.RUNNING
    file.write_text(f"{text}[budget.teachers.ada]\ntokens = 1_000_000\n")
    start(store, file)
    with store.read() as session:
        assert queue.halted(session, run_id, "calibrate") is None
        assert set(session.scalars(select(Job.state))) == {JobState.QUEUED}


def test_a_paused_run_goes_on_whenever_it_is_started(store: Database, tmp_path: Path) -> None:
    file, text = short_run(tmp_path)
    file.write_text(f"{text}[budget]\ntokens = 1_000_000\n")
    run_id = start(store, file)
    with store.write() as session:
        while (claim := queue.claim(session, owner="me", run_id=run_id)) is not None:
            pipeline.halt(session, claim, "budget: until a batch is collected", owner="me")
        assert session.get_one(Run, run_id).state is RunState.PAUSED
    start(store, file)
    with store.read() as session:
        assert session.get_one(Run, run_id).state is RunState.RUNNING
        assert set(session.scalars(select(Job.state))) == {JobState.QUEUED}


def test_a_budget_that_is_added_reaches_jobs_that_are_open(store: Database, tmp_path: Path) -> None:
    options = {"concurrency": 1, "latency_seconds": 0.02}  # at most two requests at once
    file, text = short_run(tmp_path, options=options)
    file.write_text(text)
    run_id = start(store, file)
    counts: list[int] = []

    class Adding(Listener):
        def saved(self, stage: str, done: int, failed: int) -> None:
            if not counts:
                file.write_text(f"{text}[budget]\ntokens = 1\n")
                start(store, file)
            counts.append(done)

    settings = Settings.from_environment({"PERSYN_HOME": str(tmp_path / "home")})
    Worker(store, settings, run_id=run_id, listener=Adding()).run()
    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.stage) == (RunState.PAUSED, "calibrate")
    assert sum(counts) < 8  # less than the first job


@pytest.mark.parametrize("budget", ["", "[budget]\ntokens = 5\n"])
def test_whether_a_run_has_a_budget_is_read_from_its_configuration(database: Database, budget: str) -> None:
    with database.write() as session:
        run = make_run(session)
        row = session.get_one(Run, run.id)
        row.config = {**row.config, **tomllib.loads(budget)}
        session.flush()
        assert expenses.has_budget(session, run.id) is bool(budget)
