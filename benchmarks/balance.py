"""Measure how evenly workers share a run, in a cluster on loopback with engines of limited speed.

python -m benchmarks.balance [--workers 8] [--teachers 3] [--calibration 2500] [--prompts 10000] [--rate 20] [--small]

Reports for each stage the mean of the workers' rows divided by the maximum (1: perfectly even), and the duration as a
multiple of the time that as many engines would need if they were never idle. Both include model loads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import func, select

from benchmarks import runs
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.work import Job, JobState
from persyn.runs import pipeline, run_file
from tests.cluster import Broker, Cluster, wait_for
from tests.postgres import Postgres

_START_SECONDS, _TIMEOUT_SECONDS = 300, 1200
#: The concurrency of an engine on a large GPU: vLLM's `max_num_seqs` there.
_CONCURRENCY = 1024
_STAGES = ("calibrate", "score", "assign", "generate")


def balance(options: argparse.Namespace, store: Database, folder: Path) -> None:
    """Execute a run and print the results of its stages."""
    how = {"rows_per_second": options.rate, "concurrency": _CONCURRENCY, "load_seconds": options.load_seconds}
    teachers = [{"name": f"t{n}", "model": f"t{n}", "engine": "fake", "options": how} for n in range(options.teachers)]
    sizes = {"calibration": options.calibration, "job_prompts": 256}
    file = runs.write(folder, options.prompts, teachers, **sizes)
    # Scoring and routing a row take less time than generating one.
    text = file.read_text()
    for table, faster in (("student", 4), ("router", 4)):
        fast = ", ".join(f"{key} = {value}" for key, value in {**how, "rows_per_second": faster * options.rate}.items())
        text = text.replace(f"[{table}]", f"[{table}]\noptions = {{ {fast} }}")
    file.write_text(text)
    with store.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="benchmark")

    def is_over() -> bool:
        with store.read() as session:
            return session.scalars(select(Run.state)).one() is not RunState.RUNNING

    wait_for(is_over, _TIMEOUT_SECONDS, "the run is over")
    _show(options, store)


def _show(options: argparse.Namespace, store: Database) -> None:
    with store.read() as session:
        assert session.scalars(select(Run.state)).one() is RunState.DONE
        rows = session.execute(
            select(Job.stage, Job.owner, func.sum(Job.n_prompts))
            .where(Job.state == JobState.DONE)
            .group_by(Job.stage, Job.owner)
        ).all()
    times = runs.stages(store)
    ends = dict(zip(_STAGES, ("score", "fit_router", "generate", "done"), strict=True))
    print(
        f"{options.workers} workers, {options.teachers} teachers, {options.rate:g} rows/s, "
        f"loads {options.load_seconds:g} s"
    )
    for stage in _STAGES:
        of_workers = sorted((int(count) for name, _, count in rows if name == stage), reverse=True)
        total = sum(of_workers)
        seconds = runs.seconds(times, stage, ends[stage])
        ideal = total / options.workers / (options.rate * (1 if stage in ("calibrate", "generate") else 4))
        print(
            f"{stage:<10} {total:6} rows, mean/max {total / options.workers / max(of_workers):.2f}; "
            f"{seconds:5.0f} s, {seconds / ideal:.2f} times the minimum; {of_workers}",
            flush=True,
        )


@contextmanager
def _cluster(options: argparse.Namespace) -> Iterator[tuple[Database, Path]]:
    broker = Broker()
    broker.start()
    try:
        with Postgres.running() as postgres, tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name:
            url = postgres.create("balance")
            cluster, store = Cluster(Path(name), url, broker), Database(url)
            store.upgrade()
            workers = [f"worker{n}" for n in range(options.workers)]
            try:
                cluster.start("dispatch", "dispatch")
                for worker in workers:
                    cluster.worker(worker)
                up = lambda: all('"ready"' in cluster.said(worker) for worker in workers)  # noqa: E731
                wait_for(up, _START_SECONDS, "the workers are up")
                yield store, Path(name)
            finally:
                cluster.stop()
                store.close()
    finally:
        broker.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=2500)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=20.0, help="rows per second of a teacher's engine")
    parser.add_argument("--load-seconds", type=float, default=2.0, help="load time of a model")
    parser.add_argument("--small", action="store_true", help="a smoke test with two workers and 40 prompts")
    options = parser.parse_args()
    if options.small:
        options.workers, options.calibration, options.prompts, options.load_seconds = 2, 20, 40, 0.0
    with _cluster(options) as (store, folder):
        balance(options, store, folder)


if __name__ == "__main__":
    main()
