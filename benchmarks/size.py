"""Measure every step of large runs: seconds, rows per second, memory of each process, and the size of the store.

python -m benchmarks.size [--sizes 10000 100000 1000000] [--databases sqlite postgresql] [--steps import plan]

Each step is a command as a user runs it, or a stage of `persyn run start`, with engines that answer immediately. CPU
seconds, which other work on the machine does not change much, are those of all processes together, PostgreSQL's
included. Memory is resident, sampled five times a second: of the command, of its largest engine host, and the private
memory of the largest process of PostgreSQL. While the run is working, `persyn run status` is asked from time to time.
The growth is that of CPU seconds and of the command's memory per tenfold number of prompts: 10 is linear, 1 constant.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from sqlalchemy import text

from benchmarks import runs
from benchmarks.store import DATABASES, database
from persyn.db.connect import Database

STEPS = ("import", "plan", "run", "status", "report", "export")
#: So few that no verdict can decide against routing, which a router without any skill would deserve.
CALIBRATION = 48
_SAMPLE_SECONDS = 0.2
_STATUS_SECONDS = 20.0
_MIB = 2**20
_COLUMNS = {"step": 14, "rows": 10, "seconds": 9, "CPU s": 8, "rows/CPU s": 10, "MiB": 7, "host": 7, "server": 7}
HEADER = " ".join(f"{name:{'<' if name == 'step' else '>'}{width}}" for name, width in _COLUMNS.items()) + "    store"


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a command, its largest engine host, and PostgreSQL's largest process, in MiB."""

    command: float = 0.0
    host: float = 0.0
    server: float = 0.0

    def most(self, other: Memory) -> Memory:
        """The larger of each figure."""
        return Memory(max(self.command, other.command), max(self.host, other.host), max(self.server, other.server))


@dataclass(frozen=True, slots=True)
class Step:
    """The figures of one step; the store's size in MiB is that at its end, where it was looked at."""

    name: str
    rows: int
    seconds: float
    cpu: float
    memory: Memory
    store: float | None = None

    def __str__(self) -> str:
        rate = self.rows / self.cpu if self.cpu else math.inf
        memory = self.memory.command, self.memory.host, self.memory.server
        return " ".join(
            (
                f"{self.name:<14} {self.rows:>10,} {self.seconds:>9.1f} {self.cpu:>8.1f} {rate:>10,.0f}",
                *(f"{each:>7,.0f}" for each in memory),
                "" if self.store is None else f"{self.store:>8,.0f}",
            )
        )


@dataclass(slots=True)
class Samples:
    """The memory of a command's processes over its time, and the CPU seconds that they have used so far."""

    at: list[tuple[float, float, Memory]] = field(default_factory=list)

    def step(self, name: str, rows: int, first: float, last: float, store: float | None = None) -> Step:
        """The step from one time to another."""
        peak = Memory()
        for moment, _, memory in self.at:
            if first - _SAMPLE_SECONDS <= moment <= last + _SAMPLE_SECONDS:
                peak = peak.most(memory)
        return Step(name, rows, last - first, self._cpu(last) - self._cpu(first), peak, store)

    def _cpu(self, until: float) -> float:
        return max((cpu for moment, cpu, _ in self.at if moment <= until), default=0.0)


class Case:
    """One store and one run file; its commands are measured one after the other."""

    def __init__(self, folder: Path, url: str, prompts: int, options: argparse.Namespace) -> None:
        self.folder, self.url, self.prompts, self.options = folder, url, prompts, options
        teachers = [{"name": f"t{n}", "model": f"t{n}", "engine": "fake"} for n in range(options.teachers)]
        self.file = runs.write(folder, prompts, teachers, calibration=options.calibration, job_prompts=256)

    def steps(self) -> Iterator[Step]:
        """Measure the wanted steps, in their order."""
        measures: dict[str, Callable[[], Iterator[Step]]] = {
            "import": lambda: self._command("import", "prompts", "import", str(self.folder / "prompts.jsonl")),
            "plan": lambda: self._command("plan", "plan", str(self.file)),
            "run": self._run,
            "status": lambda: self._command("status", "run", "status", runs.NAME),
            "report": lambda: self._command("report", "report", runs.NAME, "-o", str(self.folder / "report.html")),
            "export": lambda: self._command("export", "export", runs.NAME, "-o", str(self.folder / "dataset")),
        }
        for name, measure in measures.items():
            if name in self.options.steps:
                yield from measure()

    def _command(self, name: str, *arguments: str) -> Iterator[Step]:
        began = time.time()
        samples = self._execute(arguments)
        yield samples.step(name, self.prompts, began, time.time(), self._size())

    def _run(self) -> Iterator[Step]:
        """Execute the run; its stages are told apart by the store's events."""
        asked: list[Step] = []
        began = time.time()
        samples = self._execute(("run", "start", str(self.file)), asked)
        ended = time.time()
        store = Database(self.url)
        times = {name: at.timestamp() for name, at in runs.stages(store).items()}
        store.close()
        grid = self.options.calibration * self.options.teachers
        rows = {"calibrate": grid, "score": 2 * grid, "fit_router": self.options.calibration, "assign": self.prompts}
        rows["generate"] = self.prompts - self.options.calibration
        marks = [("start", began), *sorted(times.items(), key=lambda mark: mark[1]), ("", ended)]
        for (name, first), (_, last) in pairwise(marks):
            named = "write dataset" if name == "done" else name
            yield samples.step(named, rows.get(name, self.prompts), first, last)
        yield samples.step("whole run", self.prompts, began, ended, self._size())
        if asked:
            yield max(asked, key=lambda step: step.cpu)

    def _execute(self, arguments: Sequence[str], asked: list[Step] | None = None) -> Samples:
        """Run a command to its end; return its memory and CPU seconds. Its status is asked for meanwhile, if wanted."""
        samples, began, others = Samples(), time.time(), 0.0
        server, next_status = self._server(), began + self.options.status_seconds
        used, used_there = _children(), _cpu(server)
        with runs.persyn(self.folder, self.url, *arguments) as process:
            while process.poll() is None:
                own = psutil.Process(process.pid)
                samples.at.append((time.time(), _cpu(own) + _cpu(server) - used_there, _memory(own, server)))
                if time.time() - began > self.options.timeout:
                    raise RuntimeError(f"{' '.join(arguments)} did not finish within {self.options.timeout:,.0f} s")
                if asked is not None and time.time() > next_status:
                    before = _children()
                    with contextlib.suppress(RuntimeError):  # until the run is stored
                        asked += self._command("status (then)", "run", "status", runs.NAME)
                    others += _children() - before
                    next_status = time.time() + self.options.status_seconds
                time.sleep(_SAMPLE_SECONDS)
        if process.returncode:
            raise RuntimeError((self.folder / "output").read_text()[-2000:])
        samples.at.append((time.time(), _children() - used - others + _cpu(server) - used_there, Memory()))
        return samples

    def _server(self) -> psutil.Process | None:
        """The PostgreSQL server's first process."""
        if not self.url.startswith("postgresql"):
            return None
        store = Database(self.url)
        with store.read() as session:
            backend = psutil.Process(session.scalar(text("SELECT pg_backend_pid()")))
            server = backend.parent()
        store.close()
        return server

    def _size(self) -> float:
        if not self.url.startswith("postgresql"):
            return sum(path.stat().st_size for path in self.folder.glob("persyn.db*")) / _MIB
        store = Database(self.url)
        with store.read() as session:
            size = session.scalar(text("SELECT pg_database_size(current_database())"))
        store.close()
        return float(size or 0) / _MIB


def _memory(process: psutil.Process, server: psutil.Process | None) -> Memory:
    command, host, private = 0.0, 0.0, 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        command = _kib(process.pid, "VmRSS") / 1024
        host = max((_kib(child.pid, "VmRSS") / 1024 for child in process.children(recursive=True)), default=0.0)
    if server is not None:
        private = max((_kib(child.pid, "RssAnon") / 1024 for child in server.children()), default=0.0)
    return Memory(command, host, private)


def _cpu(process: psutil.Process | None) -> float:
    """The CPU seconds of a process with all that it has started."""
    seconds = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)] if process else ():
            seconds += sum(each.cpu_times()[:4])  # its own, and those of processes that have ended
    return seconds


def _children() -> float:
    """The CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kib(pid: int, name: str) -> int:
    """A figure of /proc/PID/status; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def growth(small: Sequence[Step], large: Sequence[Step], sizes: tuple[int, int]) -> Iterator[str]:
    """For each step, the factors by which seconds and memory grow per tenfold number of prompts."""
    decades = math.log10(sizes[1] / sizes[0])
    before = {step.name: step for step in small}
    for step in large:
        if (was := before.get(step.name)) is not None and was.cpu:
            seconds = (step.cpu / was.cpu) ** (1 / decades)
            memory = (step.memory.command / was.memory.command) ** (1 / decades) if was.memory.command else math.nan
            yield f"{step.name:<14} {seconds:>9.2f} {memory:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="numbers of prompts")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--teachers", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=CALIBRATION)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="the last three need 'run'")
    parser.add_argument("--status-seconds", type=float, default=_STATUS_SECONDS, help="between two looks at the status")
    parser.add_argument("--timeout", type=float, default=7_200.0, help="seconds for one command")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are ended and files removed
    for kind in options.databases:
        found: dict[int, list[Step]] = {}
        for size in sorted(options.sizes):
            print(f"{kind}, {size:,} prompts, {options.teachers} teachers\n{HEADER}", flush=True)
            found[size] = []
            with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name, database(kind, Path(name)) as url:
                for step in Case(Path(name), url, size, options).steps():
                    found[size].append(step)
                    print(step, flush=True)
            print()
        for small, large in pairwise(found):
            print(f"{kind}, growth from {small:,} to {large:,} per decade\n{'step':<14} {'CPU s':>9} {'MiB':>9}")
            print("\n".join(growth(found[small], found[large], (small, large))), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
