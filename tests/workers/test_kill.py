"""After repeated `kill -9` of a whole run, every prompt is answered once, and few are requested twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest
from sqlalchemy import func, select, text

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Router, RouterScore
from persyn.db.work import Job, JobState
from tests.cluster import wait_for
from tests.one_database import POSTGRESQL
from tests.run_files import PROMPTS as PROMPTS_OF_RUN
from tests.run_files import TEACHERS, write_run

CONCURRENCY = 8
#: The maximum that a worker submits to an engine: twice its concurrency.
WINDOW = 2 * CONCURRENCY
Persyn: TypeAlias = Callable[..., subprocess.Popen[bytes]]
PROMPTS, CALIBRATION, KILLS = 120, 30, 5


@pytest.fixture
def persyn() -> Iterator[Persyn]:
    """The command in its own process group, with its output in `said`; all end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, url: str, *arguments: str, output: str = "output") -> subprocess.Popen[bytes]:
        started.append(_start(folder, url, *arguments, output=output))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(folder: Path, url: str, *arguments: str, output: str) -> subprocess.Popen[bytes]:
    with (folder / output).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", "from persyn.cli.main import main; main()", "--debug", *arguments],
            env={**os.environ, "PERSYN_DATABASE_URL": url, "PERSYN_HOME": str(folder / "home")},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def said(folder: Path) -> str:
    return (folder / "output").read_text()


def asked(journal: Path) -> list[tuple[str, str]]:
    """Every (teacher, prompt) started by an engine, in order; a line truncated by a kill is ignored."""
    if not journal.exists():
        return []
    return [tuple(json.loads(line)) for line in journal.read_text().splitlines() if line.endswith('"]')]


def count_asked(journal: Path) -> int:
    """The length of `asked`, for a caller that waits."""
    return journal.read_bytes().count(b'"]\n') if journal.exists() else 0


def kill_after(process: subprocess.Popen[bytes], journal: Path, requests: int) -> bool:
    """SIGKILL the group after the given number of further requests; False if the run ended before."""
    goal = count_asked(journal) + requests
    while count_asked(journal) < goal:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def hosts(folder: Path) -> list[psutil.Process]:
    """The engine hosts of this run, without those of other tests."""
    return [
        p
        for p in psutil.process_iter(["cmdline", "environ"])
        if "persyn.llm.host" in (p.info["cmdline"] or [])
        and (p.info["environ"] or {}).get("PERSYN_HOME") == str(folder / "home")
    ]


def require_no_orphans(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while orphans := hosts(folder):
        assert time.monotonic() < deadline, orphans
        time.sleep(0.05)


@pytest.mark.parametrize("seed", [1])
def test_a_run_killed_again_and_again_answers_every_prompt_once(
    database: Database, database_url: str, tmp_path: Path, persyn: Persyn, seed: int
) -> None:
    journal = tmp_path / "journal"
    options = {"latency_seconds": 0.02, "concurrency": CONCURRENCY, "journal": str(journal)}
    file = write_run(tmp_path, prompts=PROMPTS, calibration=CALIBRATION, job_prompts=32, options=options)
    moments = random.Random(seed)

    command = ("run", "start", str(file))
    for _ in range(KILLS):
        process = persyn(tmp_path, database_url, *command)
        assert kill_after(process, journal, moments.randint(15, 45)), said(tmp_path)
        require_no_orphans(tmp_path)
        command = ("run", "resume", "test")
    last = persyn(tmp_path, database_url, *command)
    assert last.wait(timeout=120) == 0, said(tmp_path)

    needed = CALIBRATION * len(TEACHERS) + PROMPTS - CALIBRATION
    with database.read() as session:
        assert session.scalars(select(Run.state)).one() is RunState.DONE
        assert set(session.scalars(select(Job.state))) == {JobState.DONE}
        assert session.scalar(select(func.count(Response.text))) == needed
    taken_up = asked(journal)
    assert len(set(taken_up)) == needed
    assert len(taken_up) - needed <= KILLS * WINDOW


@POSTGRESQL
def test_a_run_killed_between_the_fit_and_the_save_of_its_router_goes_on_and_has_one(
    database: Database, database_url: str, tmp_path: Path, persyn: Persyn
) -> None:
    process = persyn(tmp_path, database_url, "run", "start", str(write_run(tmp_path, fit_seconds=2)))
    routers = tmp_path / "home" / "routers"
    wait_for(lambda: fits(database, JobState.RUNNING) == 1, 60, "the router is being fitted")
    with database.write() as session:
        session.execute(text("LOCK TABLE routers IN EXCLUSIVE MODE"))  # its save waits
        wait_for(lambda: bool([*routers.glob("*/router.msgpack")]), 60, "the router is on disk")
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with database.read() as session:
        assert session.scalars(select(func.count()).select_from(Router)).one() == 0
    require_no_orphans(tmp_path)
    (left,) = routers.iterdir()

    last = persyn(tmp_path, database_url, "run", "resume", "test")
    assert last.wait(timeout=120) == 0, said(tmp_path)

    with database.read() as session:
        router = session.scalars(select(Router)).one()
        run = session.scalars(select(Run)).one()
        assert (run.state, run.router_id) == (RunState.DONE, router.id)
        assert session.scalars(select(func.count()).select_from(RouterScore)).one() == PROMPTS_OF_RUN * len(TEACHERS)
        assert session.scalars(select(func.count()).select_from(Assignment)).one() == PROMPTS_OF_RUN
    assert fits(database, JobState.DONE) == 1
    # Fitted anew: nothing says whether the folder that was left behind is whole.
    assert (tmp_path / "home" / router.path / "router.msgpack").is_file()
    assert tmp_path / "home" / router.path != left


def fits(database: Database, state: JobState) -> int:
    with database.read() as session:
        jobs = select(func.count()).select_from(Job).where(Job.stage == "fit_router", Job.state == state)
        return session.scalars(jobs).one()


def test_status_tells_a_run_that_is_worked_from_one_whose_worker_was_killed(tmp_path: Path, persyn: Persyn) -> None:
    journal = tmp_path / "journal"
    options = {"latency_seconds": 0.2, "concurrency": 1, "journal": str(journal)}
    url = f"sqlite:///{tmp_path / 'persyn.db'}"

    def status() -> str:
        # Not into the file of the run, which goes on writing.
        assert persyn(tmp_path, url, "run", "status", "test", output="status").wait(timeout=30) == 0
        return (tmp_path / "status").read_text().splitlines()[1]

    process = persyn(tmp_path, url, "run", "start", str(write_run(tmp_path, options=options)))
    while not count_asked(journal):
        time.sleep(0.01)
    assert status() == "1 worker holds jobs of the run"
    assert kill_after(process, journal, 1)
    assert status() == "no worker holds a job of the run; if this persists, continue it: persyn run resume test"


def test_ctrl_c_saves_what_is_finished_and_says_how_to_go_on(tmp_path: Path, persyn: Persyn) -> None:
    journal = tmp_path / "journal"
    options = {"latency_seconds": 0.05, "concurrency": 2, "journal": str(journal)}
    url = f"sqlite:///{tmp_path / 'persyn.db'}"
    process = persyn(tmp_path, url, "run", "start", str(write_run(tmp_path, options=options)))
    while count_asked(journal) < 10:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert "persyn run resume test" in said(tmp_path)
    store = Database(url)
    with store.read() as session:
        assert session.scalar(select(func.count(Response.text))) >= 6
        assert JobState.RUNNING not in set(session.scalars(select(Job.state)))
    store.close()
