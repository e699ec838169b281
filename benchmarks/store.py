"""Measure the costs of the store and the worker: whole runs on engines that answer immediately.

python -m benchmarks.store [--sizes 10000 100000 1000000] [--databases sqlite postgresql]

Times include a fixed cost, independent of the size: starting an engine for each teacher and some more, and one command.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import runs
from persyn.db.connect import Database
from tests.postgres import Postgres

_TIMEOUT_SECONDS = 3600.0
DATABASES = ("sqlite", "postgresql")


@dataclass(frozen=True, slots=True)
class Figures:
    """The timings of one run, in seconds."""

    prompts: int
    calibration: int
    start: float
    calibrate: float
    work: float
    total: float
    peaks: runs.Peaks

    def __str__(self) -> str:
        routed = self.prompts - self.calibration
        return (
            f"{self.prompts:>9,} {self.start:>8.1f} {self.calibrate:>10.1f} {self.work:>10.1f} "
            f"{routed / self.work:>10,.0f} {self.total:>8.1f} {1e6 * self.total / self.prompts:>9.0f} "
            f"{self.peaks.worker:>7.0f} {self.peaks.host:>6.0f}"
        )

    @property
    def work_per_prompt(self) -> float:
        """Seconds per prompt for assigning, generating and saving."""
        return self.work / (self.prompts - self.calibration)


HEADER = "  prompts  start s  to assign  ass+gen s  prompts/s  total s us/prompt  worker   host MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10_000, 100_000], help="numbers of prompts, one run each"
    )
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--job-prompts", type=int, default=256)
    parser.add_argument("--teachers", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=256, help="prompts that every teacher answers")
    options = parser.parse_args()
    for kind in options.databases:
        print(f"{kind}, {options.teachers} teachers, {options.job_prompts} prompts per job\n{HEADER}")
        figures = []
        for size in sorted(options.sizes):
            with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name, database(kind, Path(name)) as url:
                figures.append(_measure(Path(name), url, size, options))
            print(figures[-1], flush=True)
        least, most = figures[0], figures[-1]
        print(
            f"time per prompt, {most.prompts:,} to {least.prompts:,} prompts: "
            f"{most.work_per_prompt / least.work_per_prompt:.2f} in assign + generate, "
            f"{most.total / most.prompts / (least.total / least.prompts):.2f} overall\n"
        )


def _measure(folder: Path, url: str, prompts: int, options: argparse.Namespace) -> Figures:
    teachers = [{"name": f"t{n}", "model": f"t{n}", "engine": "fake"} for n in range(options.teachers)]
    sizes = {"calibration": options.calibration, "job_prompts": options.job_prompts}
    file = runs.write(folder, prompts, teachers, **sizes)
    began = time.time()
    with runs.persyn(folder, url, "run", "start", str(file)) as process:
        peaks = runs.finish(process, folder, _TIMEOUT_SECONDS)
    total = time.time() - began
    database = Database(url)
    times = runs.stages(database)
    database.close()
    return Figures(
        prompts=prompts,
        calibration=options.calibration,
        start=times["calibrate"].timestamp() - began,
        calibrate=runs.seconds(times, "calibrate", "assign"),
        work=runs.seconds(times, "assign", "done"),
        total=total,
        peaks=peaks,
    )


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """An empty, migrated store: a SQLite file, or a PostgreSQL server with default settings."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'persyn.db'}"
        return
    with Postgres.running(durable=True) as server:
        url = server.create("benchmark")
        store = Database(url)
        store.upgrade()
        store.close()
        yield url


if __name__ == "__main__":
    main()
