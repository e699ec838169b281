"""Kill three workers of a run with a budget, again and again, and compare what was counted with the server's own bill.

python -m tests.budget_kill [--kills 10] [--seed 1] [--database sqlite | postgresql]

The teachers are behind a server that charges every request when it arrives, whether or not anybody is left to receive
the response. The run must stop below its limit, and finish when the limit is raised. Prints one line.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.spending import Expense
from persyn.runs import pipeline, run_file
from tests.chat_server import Server, completion
from tests.postgres import Postgres
from tests.run_files import TEACHERS, write_run

WORKERS, CONCURRENCY, LATENCY_SECONDS = 3, 4, 0.03
PROMPTS, CALIBRATION, MAX_TOKENS = 150, 20, 40
#: US dollars per million tokens.
PRICE_IN, PRICE_OUT = 1000.0, 5000.0
_LIMIT_SECONDS = 300.0
#: Between two looks at a run that nobody is about to kill.
_POLL_SECONDS = 0.3


@dataclass(slots=True)
class Bill:
    """What the server has charged: by tokens, and by how often each request was asked."""

    tokens: int = 0
    usd: float = 0.0
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def charge(self, body: dict[str, Any]) -> dict[str, int]:
        """Charge one request; returns its usage. The length of a response depends on the request alone."""
        said = body["messages"][-1]["content"]
        response = 1 + hashlib.sha256(f"{body['model']}{said}".encode()).digest()[0] % body["max_tokens"]
        prompt = len(said.split()) + 8
        self.tokens += prompt + response
        self.usd += (prompt * PRICE_IN + response * PRICE_OUT) / 1e6
        self.asked[body["model"], said] += 1
        return {"prompt_tokens": prompt, "completion_tokens": response, "total_tokens": prompt + response}


@dataclass(slots=True)
class Outcome:
    """What was charged and counted when the run had stopped, and at its end; US dollars."""

    limit: float
    state: str = ""
    billed: float = 0.0
    spent: float = 0.0
    lost: int = 0
    most_held: float = 0.0
    kills: int = 0
    end_state: str = ""
    end_billed: float = 0.0
    end_spent: float = 0.0
    responses: int = 0
    duplicates: int = 0
    #: Results that were counted more or less often than they were stored.
    miscounted: int = 0
    asked_again: int = 0

    def __str__(self) -> str:
        return (
            f"limit ${self.limit:.2f}: {self.state} with ${self.billed:.4f} charged by the server and "
            f"${self.spent:.4f} counted, {self.lost} requests lost in flight, at most "
            f"${self.most_held:.4f} in flight; raised: "
            f"{self.end_state} with ${self.end_billed:.4f} charged and ${self.end_spent:.4f} counted, "
            f"{self.responses} responses, {self.duplicates} duplicates, {self.miscounted} miscounted, "
            f"{self.asked_again} asked again after {self.kills} kills"
        )


class Killing:
    """A run, its server, and three processes that work it."""

    def __init__(self, folder: Path, url: str, server: Server, *, seed: int) -> None:
        self._folder, self._url, self._server = folder, url, server
        self._random = random.Random(seed)
        self._database = Database(url)
        self._bill = Bill()
        self._workers: list[subprocess.Popen[bytes]] = []
        server.reply = lambda n: self._reply(n)

    def measure(self, *, limit: float, kills: int) -> Outcome:
        """Work the run until it stops for its budget and, with a raised one, to its end, under so many kills in all."""
        found = Outcome(limit)
        try:
            self._start(limit)
            self._work(found, kills - kills // 2)
            with self._database.read() as session:
                found.state = session.scalars(select(Run.state)).one().value
                found.spent, found.lost = session.execute(select(func.sum(Expense.usd), func.sum(Expense.lost))).one()
            found.billed = self._bill.usd
            self._start(1000 * limit)
            self._work(found, kills // 2)
            self._count(found)
        finally:
            for worker in self._workers:
                _kill(worker)
            self._database.close()
        return found

    async def _reply(self, n: int) -> Any:
        usage = self._bill.charge(self._server.bodies[n - 1])
        await asyncio.sleep(LATENCY_SECONDS)
        return completion("Four.", usage=usage)

    def _start(self, limit: float) -> None:
        options = {"base_url": self._server.base_url, "concurrency": CONCURRENCY}
        file = write_run(
            self._folder, prompts=PROMPTS, calibration=CALIBRATION, engine="openai", options=options, job_prompts=16
        )
        priced = (
            f"price_in = {PRICE_IN}\nprice_out = {PRICE_OUT}\nsampling = {{ max_tokens = {MAX_TOKENS} }}\noptions ="
        )
        text = file.read_text().replace("options =", priced)
        file.write_text(f"{text}\n[budget]\nusd = {limit}\n")
        with self._database.write() as session:
            pipeline.start_run(session, run_file.read(file), actor="test")

    def _work(self, found: Outcome, kills: int) -> None:
        """Kill workers at random moments and replace them; then let them work until the run has stopped."""
        self._workers = [self._resume() for _ in range(WORKERS)]
        began = time.monotonic()
        for _ in range(kills):
            goal = len(self._server.bodies) + self._random.randint(2, 25)
            while len(self._server.bodies) < goal and self._is_running() and time.monotonic() - began < _LIMIT_SECONDS:
                self._look(found)
            if not self._is_running():
                break
            place = self._random.randrange(WORKERS)
            _kill(self._workers[place])
            self._workers[place] = self._resume()
            found.kills += 1
        while self._is_running():
            assert time.monotonic() - began < _LIMIT_SECONDS, (self._folder / "output").read_text()
            self._look(found)
            time.sleep(_POLL_SECONDS)
        for worker in self._workers:
            worker.wait(timeout=60)

    def _resume(self) -> subprocess.Popen[bytes]:
        with (self._folder / "output").open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-c", "from persyn.cli.main import main; main()", "run", "resume", "test"],
                env={**os.environ, "PERSYN_DATABASE_URL": self._url, "PERSYN_HOME": str(self._folder / "home")},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def _is_running(self) -> bool:
        with self._database.read() as session:
            return session.scalars(select(Run.state)).one() is RunState.RUNNING

    def _look(self, found: Outcome) -> None:
        with self._database.read() as session:
            held = session.scalar(select(func.sum(Expense.held_usd))) or 0.0
        found.most_held = max(found.most_held, held)
        time.sleep(0.02)

    def _count(self, found: Outcome) -> None:
        with self._database.read() as session:
            found.end_state = session.scalars(select(Run.state)).one().value
            found.end_spent = session.scalars(select(func.sum(Expense.usd))).one()
            found.responses = session.scalars(select(func.count()).select_from(Response)).one()
            keys = select(Response.prompt_id, Response.teacher_id, Response.sample).distinct().subquery()
            found.duplicates = found.responses - session.scalars(select(func.count()).select_from(keys)).one()
            counted = select(func.sum(Expense.requests)).where(Expense.teacher_id.is_not(None))
            found.miscounted = abs(session.scalars(counted).one() - found.responses)
        found.end_billed = self._bill.usd
        found.asked_again = self._bill.asked.total() - len(self._bill.asked)


def needed() -> int:
    """The number of responses of the whole run."""
    return CALIBRATION * len(TEACHERS) + PROMPTS - CALIBRATION


def _kill(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@contextmanager
def _database_url(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'persyn.db'}"
        return
    with Postgres.running() as server:
        yield server.create("budget_kill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=10.0, help="US dollars")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="persyn-budget-") as name:
        folder = Path(name)
        with _database_url(chosen.database, folder) as url, Server.running() as server:
            store = Database(url)
            store.upgrade()
            store.close()
            print(Killing(folder, url, server, seed=chosen.seed).measure(limit=chosen.limit, kills=chosen.kills))


if __name__ == "__main__":
    main()
