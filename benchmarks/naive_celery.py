"""Compare PerSyn with plain Celery (one task per prompt, default settings) when a worker is killed halfway.

python -m benchmarks.naive_celery [--prompts 2000]

Both sides answer the same number of prompts, eight at a time, each in a tenth of a second; both lose their worker to
SIGKILL halfway and get another one. Rows and requested prompts are counted once nothing changes any more.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from celery import Celery
from sqlalchemy import create_engine, func, select, text

from benchmarks import runs
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.runs import pipeline, run_file
from tests.cluster import Broker, Cluster, wait_for
from tests.postgres import Postgres

_CONCURRENCY, _LATENCY_SECONDS = 8, 0.1
_TIMEOUT_SECONDS = 600.0
#: Work is considered finished after this long without progress.
_STILL_SECONDS = 5.0

app = Celery("naive", broker=os.environ.get("NAIVE_BROKER_URL"))


@app.task(name="naive.answer")  # type: ignore[untyped-decorator]  # named, because a script's module has another name in the worker
def answer(prompt: int) -> None:
    """Answer a prompt and store the answer."""
    time.sleep(_LATENCY_SECONDS)
    engine = create_engine(os.environ["NAIVE_DATABASE_URL"])
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO answers VALUES (:prompt)"), {"prompt": prompt})
    engine.dispose()


class Naive:
    """A queue of prompts, a table of answers, and a worker."""

    def __init__(self, url: str, broker: Broker, folder: Path) -> None:
        self._environment = {**os.environ, "NAIVE_BROKER_URL": broker.url, "NAIVE_DATABASE_URL": url}
        self._engine = create_engine(url)
        self._broker = broker
        self._log = folder / "naive.log"
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE answers (prompt integer)"))

    def run(self, prompts: int) -> None:
        """Send prompts, kill the worker halfway, start another, and count; then send all again, as a user would."""
        app.conf.broker_url = self._broker.url
        self._send(prompts)
        worker = self._start()
        wait_for(lambda: self._count()[0] >= prompts // 2, _TIMEOUT_SECONDS, "half is there")
        _kill(worker)
        worker = self._start()
        _wait_still(lambda: self._count()[0])
        rows, distinct = self._count()
        with self._broker.client() as client:
            held = client.hlen("unacked")
        print(
            f"naive: {prompts - distinct} of {prompts:,} prompts have no row, and nothing reports it "
            f"({held} of them would be redelivered after an hour, the rest never); {rows - distinct} have two rows",
            flush=True,
        )
        self._send(prompts)
        _wait_still(lambda: self._count()[0])
        _kill(worker)
        rows, distinct = self._count()
        print(f"naive, run again: {prompts - distinct} have no row, {rows - distinct:,} have two rows", flush=True)

    def _send(self, prompts: int) -> None:
        for prompt in range(prompts):
            answer.delay(prompt)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive_celery", "worker"]
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [*command, "--concurrency", str(_CONCURRENCY)],
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _count(self) -> tuple[int, int]:
        with self._engine.begin() as connection:
            rows, distinct = connection.execute(text("SELECT count(*), count(DISTINCT prompt) FROM answers")).one()
        return rows, distinct


def persyn(url: str, broker: Broker, folder: Path, prompts: int) -> None:
    """Do the same with PerSyn: the prompts are the calibration grid of two teachers."""
    store = Database(url)
    store.upgrade()
    journal = folder / "journal"
    options = {"latency_seconds": _LATENCY_SECONDS, "concurrency": _CONCURRENCY, "journal": str(journal)}
    teachers = [{"name": name, "model": name, "engine": "fake", "options": options} for name in ("ada", "bob")]
    file = runs.write(folder, prompts // 2 + 1, teachers, calibration=prompts // 2, job_prompts=64)
    with store.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="benchmark")

    def count() -> int:
        with store.read() as session:
            return session.scalars(select(func.count()).select_from(Response)).one()

    def is_done() -> bool:
        with store.read() as session:
            return session.scalars(select(Run.state)).one() is not RunState.RUNNING

    cluster = Cluster(folder, url, broker)
    try:
        cluster.start("dispatch", "dispatch")
        cluster.worker("one")
        wait_for(lambda: count() >= prompts // 2, _TIMEOUT_SECONDS, "half is there")
        cluster.kill("one")
        cluster.worker("two")
        wait_for(is_done, _TIMEOUT_SECONDS, "the run is over")
    finally:
        cluster.stop()
    with store.read() as session:
        keys = select(Response.prompt_id, Response.teacher_id).distinct().subquery()
        distinct = session.scalars(select(func.count()).select_from(keys)).one()
    rows, asked = count(), [line for line in journal.read_text().splitlines() if line]
    store.close()
    needed = prompts // 2 * len(teachers) + 1  # the one prompt outside the grid
    print(
        f"PerSyn: {needed - distinct} of {needed:,} have no row, {rows - distinct} have two rows; "
        f"{len(asked) - len(set(asked))} were requested twice (the window holds {2 * _CONCURRENCY})",
        flush=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_still(count: Callable[[], int]) -> None:
    seen, since, began = -1, time.monotonic(), time.monotonic()
    while time.monotonic() - since < _STILL_SECONDS:
        found, now = count(), time.monotonic()
        if found != seen:
            seen, since = found, now
        if now - began > _TIMEOUT_SECONDS:
            raise TimeoutError(f"the count still changes after {_TIMEOUT_SECONDS:.0f} s")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2_000)
    options = parser.parse_args()
    broker = Broker()
    broker.start()
    try:
        with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name, Postgres.running() as postgres:
            Naive(postgres.create("naive"), broker, Path(name)).run(options.prompts)
            broker.wipe()
            persyn(postgres.create("persyn"), broker, Path(name), options.prompts)
    finally:
        broker.kill()


if __name__ == "__main__":
    main()
