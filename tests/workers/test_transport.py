"""A run's models may be reached differently while it is worked: nothing is lost, and no row is computed again."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner
from sqlalchemy import delete, func, select, update

from persyn.cli.main import persyn
from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, Outage
from persyn.errors import UsageError
from persyn.jobs import queue
from persyn.jobs.queue import ModelJobs
from persyn.runs import pipeline, run_file, transport
from persyn.settings import Settings
from persyn.stages.registry import STAGES
from persyn.workers.runner import worker as runner
from persyn.workers.runner.worker import Worker
from tests.chat_server import Server, completion, error
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import write_run

TEACHERS = ("ada", "bob")
#: Each is given to one of the teachers.
ROWS = 24


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    with Server.running() as old, Server.running() as new:
        yield old, new


def write(folder: Path, base_url: str, **run: Any) -> Path:
    """A run file whose teachers are at an address."""
    options = {"base_url": base_url, "max_retries": 1, "concurrency": 2}
    return write_run(
        folder, prompts=ROWS, teachers=TEACHERS, engine="openai", options=options, strategy="random", **run
    )


def begin(database: Database, file: Path) -> int:
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def move_by_command(database: Database, file: Path, url: str) -> None:
    for teacher in TEACHERS:
        done = CliRunner().invoke(persyn, ["teachers", "set", "test", teacher, f"base_url={url}"])
        assert done.exit_code == 0, done.output


def move_by_file(database: Database, file: Path, url: str) -> None:
    begin(database, write(file.parent, url))


def on(*ways: tuple[str, Any]) -> Any:
    """Each way on one database."""
    return pytest.mark.parametrize(("database_url", "move"), ways, indirect=["database_url"])


@pytest.fixture(autouse=True)
def _environment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path))
    if "database" in request.fixturenames:
        url = request.getfixturevalue("database").url.render_as_string(hide_password=False)
        monkeypatch.setenv("PERSYN_DATABASE_URL", url)


def working(database: Database, folder: Path, run_id: int | None) -> threading.Thread:
    settings = Settings(database_url="", home=folder, lease_seconds=2)
    thread = threading.Thread(target=Worker(database, settings, run_id=run_id).run)
    thread.start()
    return thread


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def after(seconds: float) -> Callable[[int], Any]:
    async def reply(n: int) -> web.Response:
        await asyncio.sleep(seconds)
        return completion("Four.")

    return reply


def require_done(database: Database) -> None:
    with database.read() as session:
        run = session.scalars(select(Run)).one()
        assert (run.state, run.error) == (RunState.DONE, None)
        assert session.scalars(select(func.count(Response.text))).one() == ROWS
        assert session.scalars(select(func.count(Response.failure))).one() == 0
        assert session.scalars(select(Outage)).all() == []


@on(("sqlite", move_by_command), ("postgresql", move_by_file))
def test_a_run_moves_to_another_address_while_the_old_one_answers_and_asks_nothing_twice(
    database: Database, tmp_path: Path, servers: tuple[Server, Server], move: Callable[..., None]
) -> None:
    old, new = servers
    moved = threading.Event()
    old.reply = held_until(moved, lambda: completion("Four."))
    file = write(tmp_path, old.base_url)
    run_id = begin(database, file)
    thread = working(database, tmp_path, run_id)
    wait_until(lambda: len(old.bodies) > 3)

    move(database, file, new.base_url)
    moved.set()
    thread.join(60)

    require_done(database)
    assert len(old.bodies) + len(new.bodies) == ROWS  # no row was requested twice
    assert {body["model"] for body in old.bodies} < {body["model"] for body in new.bodies} == {*TEACHERS}
    with database.read() as session:
        events = session.scalars(select(Event).where(Event.job_id.is_(None)).order_by(Event.id)).all()
        (first, *_) = changes = [event for event in events if "changed" in event.detail]
        said = [each for event in changes for each in event.detail["changed"]]
    assert said == [
        {"key": f"teachers[{n}].options.base_url", "was": old.base_url, "now": new.base_url} for n in range(2)
    ]
    assert (first.from_state, first.to_state, first.run_id) == ("running", "running", run_id)


@SQLITE
def test_what_the_old_server_refuses_after_the_change_is_requested_at_the_new_address(
    database: Database, tmp_path: Path, servers: tuple[Server, Server]
) -> None:
    old, new = servers
    moved = threading.Event()
    old.reply = held_until(moved, lambda: error(400, "no such model"))
    file = write(tmp_path, old.base_url)
    thread = working(database, tmp_path, begin(database, file))
    wait_until(lambda: len(old.bodies) > 3)

    move_by_file(database, file, new.base_url)
    moved.set()
    thread.join(60)

    require_done(database)
    assert len(new.bodies) == ROWS - 3


def held_until(moved: threading.Event, then: Callable[[], web.Response]) -> Callable[[int], Any]:
    """Answers three requests; the others are in flight until the event, and answered half a second later."""

    async def reply(n: int) -> web.Response:
        while n > 3 and not moved.is_set():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5 if moved.is_set() else 0)
        return then() if n > 3 else completion("Four.")

    return reply


def fails(n: int) -> web.Response:
    return error(500, "down")


async def hangs(n: int) -> web.Response:
    await asyncio.sleep(60)
    return error(500, "unreachable")


@SQLITE
@pytest.mark.parametrize("reply", [fails, hangs])
def test_a_run_moves_away_from_a_server_that_fails_and_no_row_fails_with_it(
    database: Database,
    tmp_path: Path,
    servers: tuple[Server, Server],
    monkeypatch: pytest.MonkeyPatch,
    reply: Callable[[int], Any],
) -> None:
    monkeypatch.setattr(runner, "_TURN_SECONDS", 1.0)
    old, new = servers
    old.reply = lambda n: completion("Four.") if n <= 3 else reply(n)
    file = write(tmp_path, old.base_url)
    thread = working(database, tmp_path, begin(database, file))
    wait_until(lambda: len(old.bodies) > 3)

    move_by_command(database, file, new.base_url)
    thread.join(60)

    require_done(database)
    assert len(new.bodies) == ROWS - 3


@on(("postgresql", move_by_command), ("sqlite", move_by_file))
def test_a_run_that_waits_for_a_dead_server_goes_on_at_once(
    database: Database, tmp_path: Path, move: Callable[..., None]
) -> None:
    with Server.running() as new:
        file = write(tmp_path, "http://127.0.0.1:9/v1")
        run_id = begin(database, file)
        with database.write() as session:
            claim = queue.claim(session, owner="host/1/1/a", run_id=run_id)
            assert claim is not None
            assert pipeline.wait_out(session, claim, "no server", owner="host/1/1/a")
            session.execute(update(Job).values(not_before=now(timedelta(hours=1))))
        with database.write() as session:
            assert queue.claim(session, owner="me") is None

        move(database, file, new.base_url)
        thread = working(database, tmp_path, run_id)
        thread.join(60)

        require_done(database)
        assert len(new.bodies) == ROWS


@SQLITE
def test_what_a_worker_holds_of_the_old_address_counts_for_nothing(
    database: Database, tmp_path: Path, servers: tuple[Server, Server]
) -> None:
    """Whatever happened to a job at the old address, it is released to the new one without an attempt."""
    old, new = servers
    file = write(tmp_path, old.base_url)
    run_id = begin(database, file)
    with database.write() as session:
        claims = [queue.claim(session, owner="me") for _ in range(2)]
    move_by_file(database, file, new.base_url)

    with database.write() as session:
        for end, claim in zip((pipeline.wait_out, pipeline.give_up), claims, strict=True):
            assert claim is not None
            assert queue.turned(session, [claim]) == {claim.id}
            end(session, claim, "HTTP 500", owner="me")
    with database.read() as session:
        held = session.scalars(select(Job).where(Job.id.in_([claim.id for claim in claims if claim]))).all()
        assert [(job.state, job.attempts, job.not_before) for job in held] == [(JobState.QUEUED, 0, None)] * 2
        assert session.scalars(select(Outage)).all() == []
        assert session.get_one(Run, run_id).state is RunState.RUNNING


@SQLITE
def test_a_run_killed_on_the_way_goes_on_at_the_new_address(
    database: Database, tmp_path: Path, servers: tuple[Server, Server]
) -> None:
    old, new = servers
    old.reply = after(0.2)
    file = write(tmp_path, old.base_url)
    process = subprocess.Popen(
        [sys.executable, "-m", "persyn.cli", "run", "start", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(old.bodies) >= 5)
    move_by_file(database, file, new.base_url)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with database.write() as session:
        pipeline.resume(session, session.scalars(select(Run)).one(), actor="me")
    working(database, tmp_path, None).join(60)

    require_done(database)
    # Those that were in flight or not yet stored when it was killed: twice the concurrency, at either address.
    assert len(old.bodies) + len(new.bodies) <= ROWS + 2 * 4


@SQLITE
def test_two_runs_reach_one_teacher_at_their_own_addresses_at_the_same_time(
    database: Database, tmp_path: Path, servers: tuple[Server, Server]
) -> None:
    runs = []
    for name, server in zip("ab", servers, strict=True):
        (tmp_path / name).mkdir()
        file = write(tmp_path / name, server.base_url, name=name)
        prompts = tmp_path / name / "prompts.jsonl"
        prompts.write_text(prompts.read_text().replace("What is", f"{name}: what is"))
        runs.append(begin(database, file))
        server.reply = after(0.05)
    threads = [working(database, tmp_path, None) for _ in range(2)]
    for thread in threads:
        thread.join(60)

    with database.read() as session:
        assert session.scalars(select(Run.state)).all() == [RunState.DONE] * 2
        assert session.scalars(select(func.count(Response.text))).one() == 2 * ROWS
        assert len(set(session.scalars(select(Response.teacher_id)))) == len(TEACHERS)
    for name, server in zip("ab", servers, strict=True):
        asked = [body["messages"][-1]["content"] for body in server.bodies]
        assert len(asked) == ROWS
        assert {text[:2] for text in asked} == {f"{name}:"}


@SQLITE
def test_a_new_run_at_another_address_finds_every_response(
    database: Database, tmp_path: Path, servers: tuple[Server, Server]
) -> None:
    old, new = servers
    working(database, tmp_path, begin(database, write(tmp_path, old.base_url))).join(60)
    other = begin(database, write(tmp_path, new.base_url, name="other"))
    working(database, tmp_path, other).join(60)

    with database.read() as session:
        assert session.get_one(Run, other).state is RunState.DONE
    assert (len(old.bodies), len(new.bodies)) == (ROWS, 0)


def changed(database: Database, model: str, /, **given: Any) -> list[str]:
    with database.write() as session:
        run = session.scalars(select(Run)).one()
        return [str(each) for each in transport.change_one(session, run, model, given, actor="me")]


@SQLITE
@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("teacher ada", {"extra": {"min_p": 0.1}}, "extra determines results, so it cannot be changed in run 'test'"),
        ("teacher ada", {"model": "x"}, "the teacher ada has no option model; what can be changed: gpus, api_key_env"),
        ("teacher ada", {"concurrency": 0}, "concurrency` must be an integer >= 1, got 0"),
        ("teacher ada", {"gpus": -1}, "gpus` must be an integer >= 0, got -1"),
        ("teacher ada", {"gpus": None}, "gpus= has no value"),
        ("teacher ada", {"base_url": None}, "base_url"),
        ("teacher ada", {"base_url": []}, "base_url must name one or more different URLs, got []"),
        (
            "teacher ada",
            {"base_url": ["http://a/v1", "http://b/v1"], "mode": "batch"},
            "needs a single base_url, got 2",
        ),
        ("teacher eve", {"concurrency": 2}, "run 'test' has no teacher 'eve'; its teachers: ada, bob"),
        ("student", {"response_words": 3}, "response_words determines results"),
        ("strategy", {"ratio": 3}, "the strategy has no option ratio; what can be changed: gpus"),
    ],
)
def test_what_changes_results_or_is_wrong_is_refused(
    database: Database, tmp_path: Path, model: str, given: dict[str, Any], said: str
) -> None:
    begin(database, write(tmp_path, "http://127.0.0.1:9/v1"))
    with pytest.raises(UsageError) as caught:
        changed(database, model, **given)
    assert said in str(caught.value)
    with database.read() as session:
        assert not any("changed" in detail for detail in session.scalars(select(Event.detail)))


@POSTGRESQL
def test_a_judge_and_a_student_are_reached_differently_too(database: Database, tmp_path: Path) -> None:
    file = write(tmp_path, "http://127.0.0.1:9/v1")
    judge = 'kind = "judge"\nmodel = "j"\noptions = { engine = "openai", options = { base_url = "http://x/v1" } }'
    file.write_text(file.read_text().replace('kind = "fake"', judge))
    run_id = begin(database, file)
    with database.write() as session:
        run = session.get_one(Run, run_id)
        run.stage = "score"
        row = {"run_id": run_id, "stage": "score", "first_prompt_id": 1, "last_prompt_id": 9, "n_prompts": 9}
        for scorer_id in (run.quality_scorer_id, run.learnability_scorer_id):
            session.add(Job(queue="before", scorer_id=scorer_id, **row))

    assert changed(database, "quality", base_url="http://y/v1", concurrency=3) == [
        "quality.options.options.base_url was 'http://x/v1' and is 'http://y/v1'",
        "quality.options.options.concurrency was not set and is 3",
    ]
    assert changed(database, "student", gpus=1, latency_seconds=0.5) == [
        "student.gpus was 0 and is 1",
        "student.options.latency_seconds was not set and is 0.5",
    ]
    assert changed(database, "student", gpus=1) == []

    with database.read() as session:
        run = session.get_one(Run, run_id)
        quality, student = session.scalars(select(Job).where(Job.stage == "score").order_by(Job.id)).all()
        of_judge = STAGES["score"].spec(session, run, ModelJobs("score", None, quality.scorer_id))
        assert of_judge.options["options"] == {"base_url": "http://y/v1", "concurrency": 3}
        assert of_judge.options["wording"]
        assert "before" not in (quality.queue, student.queue)
        assert (quality.gpus, student.gpus) == (0, 1)
        assert load_config(run.config).run.name == "test"


@SQLITE
def test_a_scorer_is_not_taken_for_the_teacher_with_the_same_id(database: Database, tmp_path: Path) -> None:
    file = write(tmp_path, "http://127.0.0.1:9/v1")
    file.write_text(file.read_text() + "[generation]\nsamples = 2\n")
    run_id = begin(database, file)
    with database.write() as session:
        run = session.get_one(Run, run_id)
        run.stage, scorer_id = "generate", run.quality_scorer_id
        position = lookup.position(session, run_id, scorer_id)  # of the teacher with the same id
        session.execute(delete(Job))
        row = {"run_id": run_id, "stage": "generate", "first_prompt_id": 1, "last_prompt_id": 9, "n_prompts": 9}
        session.add_all(
            [Job(queue="asking", teacher_id=scorer_id, **row), Job(queue="scoring", scorer_id=scorer_id, **row)]
        )

    assert changed(database, "quality", latency_seconds=0.5)
    with database.read() as session:
        asking, scoring = session.scalars(select(Job.queue).order_by(Job.id))
        assert (asking, scoring.split(".")[0]) == ("asking", "fake")
    assert changed(database, f"teacher {TEACHERS[position]}", concurrency=3)
    with database.read() as session:
        asking, still = session.scalars(select(Job.queue).order_by(Job.id))
        assert (asking.split(".")[0], still) == ("openai", scoring)


@SQLITE
def test_a_change_of_device_that_changes_the_numbers_is_refused_unless_the_dtype_is_kept(
    database: Database, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = write_run(tmp_path, teachers=TEACHERS)
    local = f'model = "{folder}"\nengine = "transformers"'
    file.write_text(file.read_text().replace('model = "ada"\nengine = "fake"', local))
    begin(database, file)
    with pytest.raises(
        UsageError, match="gpus = 1 changes the default dtype from float32 to bfloat16, which determines"
    ):
        changed(database, "teacher ada", gpus=1)
    assert len(changed(database, "teacher ada", gpus=1, dtype="float32")) == 1
    text = (
        file.read_text()
        .replace("gpus = 0", "gpus = 1", 1)
        .replace("options = {  }", 'options = { dtype = "float32" }', 1)
    )
    file.write_text(text)
    begin(database, file)  # is the same run


@SQLITE
def test_the_command_says_what_it_did_and_that_nobody_answers_there(database: Database, tmp_path: Path) -> None:
    begin(database, write(tmp_path, "http://127.0.0.1:9/v1"))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(persyn, list(arguments))

    done = run(
        "teachers", "set", "test", "ada", "base_url=http://127.0.0.1:8/v1", "api_key_header=api-key", "concurrency="
    )
    assert done.exit_code == 0
    assert "base_url was 'http://127.0.0.1:9/v1' and is 'http://127.0.0.1:8/v1'" in done.output
    assert "concurrency was 2 and is not set" in done.output
    assert "no server answers at http://127.0.0.1:8" in done.stderr
    assert "nothing changed" in run("teachers", "set", "test", "ada", "api_key_header=api-key").output
    two = run("teachers", "set", "test", "ada", 'base_url=["http://127.0.0.1:8/v1", "http://127.0.0.1:7/v1"]')
    assert "and is ['http://127.0.0.1:8/v1', 'http://127.0.0.1:7/v1']" in two.output
    assert "no server answers at http://127.0.0.1:7" in two.stderr
    wrong = run("teachers", "set", "test", "ada", "concurrency")
    assert "expected KEY=VALUE, such as concurrency=8, got 'concurrency'" in str(wrong.exception or wrong.output)
    listed = run("teachers", "list", "--run", "test", "--json")
    rows = json.loads(listed.output)
    assert [(row["name"], row["gpus"], row["transport"]) for row in rows] == [
        (
            "ada",
            0,
            "base_url=['http://127.0.0.1:8/v1', 'http://127.0.0.1:7/v1'], max_retries=1, api_key_header=api-key",
        ),
        ("bob", 0, "base_url=http://127.0.0.1:9/v1, max_retries=1, concurrency=2"),
    ]


@SQLITE
def test_a_server_needs_no_gpu_whatever_its_teacher_says(database: Database, tmp_path: Path) -> None:
    run_id = begin(database, write(tmp_path, "http://127.0.0.1:9/v1"))
    assert changed(database, "teacher ada", gpus=1)
    with database.read() as session:
        jobs = session.execute(
            select(Job.gpus, Job.is_light).where(Job.run_id == run_id, Job.queue.startswith("openai"))
        )
        assert {tuple(job) for job in jobs} == {(0, True)}


@SQLITE
def test_a_changed_configuration_has_the_hash_of_its_content(database: Database, tmp_path: Path) -> None:
    begin(database, write(tmp_path, "http://127.0.0.1:9/v1"))
    changed(database, "teacher ada", concurrency=1)
    with database.read() as session:
        run = session.scalars(select(Run)).one()
        assert load_config(run.config).digest() == run.config_hash
