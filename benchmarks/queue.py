"""Measure the queue's costs and its scaling with workers: real PostgreSQL, real broker, engines that only sleep.

python -m benchmarks.queue [--parts claims dispatch enqueue scaling loads] [--prompts 1000000]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from benchmarks import runs
from persyn.analysis.summary import facts
from persyn.db import bulk
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Job, Load
from persyn.jobs import queue
from persyn.runs import pipeline, run_file
from persyn.workers.cluster import app as celery_app
from persyn.workers.cluster.dispatch import Dispatcher
from tests.cluster import Broker, Cluster, wait_for
from tests.postgres import Postgres

TEACHERS = 8
_CLAIMS = 4_000
_DUE = 100_000
_TICKS = 20
#: In the scaling part, the requests in flight per worker and their latency; their ratio is one worker's rate.
_CONCURRENCY, _LATENCY_SECONDS = 32, 0.5
_RATE = _CONCURRENCY / _LATENCY_SECONDS
_SCALING_SECONDS = 40
_TIMEOUT_SECONDS = 600.0


def claims(postgres: Postgres) -> None:
    """Claim and complete empty jobs in several processes at once, with two transactions per job."""
    url = postgres.create("claims")
    with _store(url) as store, tempfile.TemporaryDirectory() as name:
        _start(store, _run_file(Path(name), 100, TEACHERS))
        for workers in (1, 2, 4, 8):
            _queue_up(store, f"claims{workers}", _CLAIMS)
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                list(pool.map(_warm_up, [url] * workers))
                began = time.monotonic()
                done = sum(pool.map(_claim_all, [url] * workers, [f"claims{workers}"] * workers))
                seconds = time.monotonic() - began
            assert done == _CLAIMS, f"{done} claims of {_CLAIMS} jobs"
            print(f"claims: {workers} processes, {done / seconds:,.0f} jobs/s claimed and completed", flush=True)


def dispatch(postgres: Postgres, broker: Broker) -> None:
    """Time a dispatcher's tick over many waiting jobs: with all messages sent, and with all messages still to send."""
    with _store(postgres.create("dispatch")) as store, tempfile.TemporaryDirectory() as name:
        _start(store, _run_file(Path(name), 100, TEACHERS))
        for n in range(TEACHERS):
            _queue_up(store, f"queue{n}", _DUE // TEACHERS)
        app = celery_app.make(broker.url)
        dispatcher = Dispatcher(store, app, lease_seconds=90)
        dispatcher.tick()
        quiet = _mean_seconds(dispatcher.tick)
        sending, sent = 0.0, 0
        for _ in range(_TICKS):
            broker.wipe()
            sending += _mean_seconds(dispatcher.tick, times=1)
            sent += _messages(broker)
        app.close()
        cost = (sending - _TICKS * quiet) / sent
        print(
            f"dispatch: {_DUE:,} jobs due in {TEACHERS} queues: a tick takes {1000 * quiet:.0f} ms, "
            f"{1000 * cost:.2f} ms more per message sent",
            flush=True,
        )


def enqueue(postgres: Postgres, prompts: int) -> None:
    """Time the start of runs in which every teacher answers every prompt: prompt import and job creation."""
    for size in sorted({prompts // 100, prompts // 10, prompts}):
        url = postgres.create(f"enqueue{size}")
        with tempfile.TemporaryDirectory() as name:
            file = _run_file(Path(name), size, TEACHERS, strategy="oracle")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                jobs, seconds, mib = pool.submit(_enqueue, url, file).result()
        print(
            f"enqueue: {size:,} prompts x {TEACHERS} teachers: {jobs:,} jobs in {seconds:.1f} s "
            f"({1e6 * seconds / size:.0f} us/prompt), peak {mib:.0f} MiB",
            flush=True,
        )


def scaling(postgres: Postgres, broker: Broker) -> None:
    """Measure throughput with 1 to 8 workers on engines of fixed latency, with constant work per worker."""
    first = None
    for workers in (1, 2, 4, 8):
        cells = int(_RATE * _SCALING_SECONDS * workers)
        options: dict[str, Any] = {"latency_seconds": _LATENCY_SECONDS, "concurrency": _CONCURRENCY}
        with _cluster(postgres, broker, f"scaling{workers}", workers) as (store, folder):
            file = _run_file(folder, cells // 2 + 1, 2, calibration=cells // 2, job_prompts=32, **options)
            _start(store, file)
            _wait(store, lambda run: run.stage != "calibrate" or run.state is not RunState.RUNNING)
            with store.read() as session:
                whole, middle = _rates(session.scalars(select(Response.created_at).order_by(Response.id)).all())
        first = first or middle
        print(
            f"scaling: {workers} workers, {middle:6.1f} responses/s in the middle half, {whole:6.1f} over all; "
            f"scaling efficiency {middle / first / workers:.3f}",
            flush=True,
        )


def loads(postgres: Postgres, broker: Broker) -> None:
    """Three workers, six teachers, 6,000 prompts: count model loads, and measure loading, working and idle time."""
    workers, teachers = 3, 6
    with _cluster(postgres, broker, "loads", workers) as (store, folder):
        options: dict[str, Any] = {"latency_seconds": 0.2, "concurrency": 16, "load_seconds": 2.0}
        _start(store, _run_file(folder, 6_000, teachers, calibration=120, job_prompts=64, **options))
        _wait(store, lambda run: run.state is not RunState.RUNNING)
        with store.read() as session:
            run = session.scalars(select(Run)).one()
            by_stage = select(Job.stage, func.count()).join(Load, Load.job_id == Job.id).group_by(Job.stage)
            counts = dict(session.execute(by_stage).all())
            print(f"loads: {workers} workers, {teachers} teachers; by stage {counts}; the run is {run.state}")
            for worker in facts(session, run).workers:
                print(
                    f"loads: {worker.claims} jobs, {worker.loads} loads in {worker.load_seconds:.1f} s, "
                    f"working {worker.work_seconds:.1f} s, idle {worker.idle_seconds:.1f} s",
                    flush=True,
                )


@contextmanager
def _store(url: str) -> Iterator[Database]:
    store = Database(url)
    store.upgrade()
    yield store
    store.close()


@contextmanager
def _cluster(postgres: Postgres, broker: Broker, name: str, workers: int) -> Iterator[tuple[Database, Path]]:
    """A running dispatcher and workers, on an empty store."""
    broker.wipe()
    with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as folder:
        url = postgres.create(name)
        cluster = Cluster(Path(folder), url, broker)
        with _store(url) as store:
            cluster.start("dispatch", "dispatch")
            names = [f"worker{n}" for n in range(workers)]
            for worker in names:
                cluster.worker(worker)
            try:
                wait_for(lambda: all('"ready"' in cluster.said(worker) for worker in names), 120, "the workers are up")
                yield store, Path(folder)
            finally:
                cluster.stop()


def _run_file(
    folder: Path,
    prompts: int,
    teachers: int,
    *,
    calibration: int = 50,
    job_prompts: int = 256,
    strategy: str = "persyn",
    **how: Any,
) -> Path:
    named = [{"name": f"t{n}", "model": f"t{n}", "engine": "fake", "options": how} for n in range(teachers)]
    return runs.write(folder, prompts, named, calibration=calibration, job_prompts=job_prompts, strategy=strategy)


def _start(store: Database, file: Path) -> None:
    with store.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="benchmark")


def _queue_up(store: Database, name: str, jobs: int) -> None:
    """Insert waiting jobs copied from an existing one, in their own queue."""
    with store.write() as session:
        like = session.scalars(select(Job).order_by(Job.id).limit(1)).one()
        row = {"run_id": like.run_id, "stage": like.stage, "queue": name, "teacher_id": like.teacher_id}
        row |= {"first_prompt_id": 1, "last_prompt_id": 1, "n_prompts": 1}
        bulk.insert_new(session, Job, [row] * jobs)


def _warm_up(url: str) -> None:
    with _store(url):
        time.sleep(0.5)  # each process of the pool takes one


def _claim_all(url: str, name: str) -> int:
    with _store(url) as store:
        done = 0
        while True:
            with store.write() as session:
                job = queue.claim(session, owner="benchmark", queue=name)
            if job is None:
                return done
            with store.write() as session:
                done += queue.complete(session, job, owner="benchmark")


def _enqueue(url: str, file: Path) -> tuple[int, float, float]:
    """The number of jobs, seconds, and this process's peak memory in MiB."""
    with _store(url) as store:
        began = time.monotonic()
        _start(store, file)
        seconds = time.monotonic() - began
        with store.read() as session:
            jobs = session.scalars(select(func.count()).select_from(Job)).one()
    return jobs, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _mean_seconds(act: Any, times: int = _TICKS) -> float:
    began = time.monotonic()
    for _ in range(times):
        act()
    return (time.monotonic() - began) / times


def _messages(broker: Broker) -> int:
    with broker.client() as client:
        return sum(client.llen(key) for key in client.keys("persyn:*") if client.type(key) == b"list")


def _rates(times: Any) -> tuple[float, float]:
    """Responses per second, in total and between the first and the last quarter of them."""
    whole = len(times) / (times[-1] - times[0]).total_seconds()
    first, last = len(times) // 4, 3 * len(times) // 4
    return whole, (last - first) / (times[last] - times[first]).total_seconds()


def _wait(store: Database, is_over: Any) -> None:
    def look() -> bool:
        with store.read() as session:
            return bool(is_over(session.scalars(select(Run)).one()))

    wait_for(look, _TIMEOUT_SECONDS, "the run is over")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("claims", "dispatch", "enqueue", "scaling", "loads")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--prompts", type=int, default=1_000_000, help="prompts of the largest run in the enqueue part")
    options = parser.parse_args()
    broker = Broker()
    broker.start()
    try:
        with Postgres.running(durable=True) as postgres:
            measure = {
                "claims": lambda: claims(postgres),
                "dispatch": lambda: dispatch(postgres, broker),
                "enqueue": lambda: enqueue(postgres, options.prompts),
                "scaling": lambda: scaling(postgres, broker),
                "loads": lambda: loads(postgres, broker),
            }
            for part in options.parts:
                measure[part]()
    finally:
        broker.kill()


if __name__ == "__main__":
    main()
