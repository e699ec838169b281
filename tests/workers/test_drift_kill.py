"""A teacher behind an API becomes another model: it is stopped once while workers are killed, and mended it goes on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from persyn.db import notes
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import ChartPoint, Response, Score
from persyn.stages import drift
from tests.chat_server import Server, completion
from tests.cluster import wait_for
from tests.one_database import POSTGRESQL
from tests.run_files import TEACHERS, write_run
from tests.workers.test_kill import _start, said

PROMPTS, CALIBRATION, CONCURRENCY, LATENCY_SECONDS = 120, 24, 2, 0.12
IN_GRID = CALIBRATION * len(TEACHERS)


class Calculator(Server):
    """Right on four of five sums, until it is broken."""

    is_broken = False

    def __init__(self) -> None:
        super().__init__()
        self.reply = lambda n: self._answer(self.bodies[n - 1]["messages"][-1]["content"])

    async def _answer(self, prompt: str) -> Any:
        await asyncio.sleep(LATENCY_SECONDS)
        number = int(re.findall(r"\d+", prompt)[0])
        return completion("-1" if self.is_broken or number % 5 == 0 else str(2 * number))


@pytest.fixture
def worker(database_url: str, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of a test; all end with it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@POSTGRESQL
def test_a_teacher_is_stopped_while_workers_are_killed_and_finishes_when_it_is_mended(
    database: Database, database_url: str, tmp_path: Path, worker: list[subprocess.Popen[bytes]]
) -> None:
    def work(*command: str) -> subprocess.Popen[bytes]:
        worker.append(_start(tmp_path, database_url, "run", *command, output="output"))
        return worker[-1]

    with Calculator.running() as server:
        options = {"base_url": server.base_url, "concurrency": CONCURRENCY}
        more = {"calibration": CALIBRATION, "job_prompts": 8, "when_unsure": "static"}
        file = write_run(tmp_path, prompts=PROMPTS, engine="openai", options=options, **more)
        text = file.read_text().replace('[quality]\nkind = "fake"', '[quality]\nkind = "math"')
        file.write_text(f"{text}[generation]\ncheck = true\n")

        process = work("start", str(file))
        wait_for(lambda: len(server.bodies) > IN_GRID, 60, "the best single teacher answers")
        server.is_broken = True
        for requests in (5, 20):
            goal = len(server.bodies) + requests
            while len(server.bodies) < goal and process.poll() is None:
                time.sleep(0.01)
            kill(process)
            process = work("resume", "test")
        assert process.wait(timeout=120) == 1, said(tmp_path)
        assert "became worse: the mean quality of its last" in said(tmp_path)

        with database.read() as session:
            run = session.scalars(select(Run)).one()
            assert run.state is RunState.FAILED
            assert len(notes.noted(session, run, drift.DRIFT)) == len(drift.stopped(session, run)) == 1
            written = session.scalars(select(func.count()).select_from(Response)).one()
            assert IN_GRID + 40 <= written < IN_GRID + PROMPTS - CALIBRATION
        server.is_broken = False
        assert work("resume", "test").wait(timeout=120) == 0, said(tmp_path)

    needed = IN_GRID + PROMPTS - CALIBRATION
    with database.read() as session:
        assert session.scalars(select(Run.state)).one() is RunState.DONE
        assert session.scalars(select(func.count(Response.text))).one() == needed
        assert session.scalars(select(func.count()).where(Score.scorer_id == run.quality_scorer_id)).one() == needed
        on_chart = session.scalars(select(func.count(ChartPoint.job_id.distinct()))).one()
        assert on_chart == session.scalars(select(func.count()).select_from(ChartPoint)).one() > 5
