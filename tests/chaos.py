"""Inject faults into a cluster on loopback while it works a run: nothing may be lost or done twice.

python -m tests.chaos [--seed 1] [--rounds 1] [--prompts 5000]

Each round has its own PostgreSQL, Valkey, two dispatchers and three workers whose clocks differ by minutes, a slow
engine, and faults drawn from the round's seed. One dispatcher and one worker reach the database through a proxy that
can freeze. Processes that exit are restarted, as a service manager would do. Filling a disk needs a separate file
system, which only root can create. Prints one line per round.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from persyn.analysis import audit
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response, Router
from persyn.db.work import Event, Job, JobState, Leader
from persyn.runs import pipeline, run_file
from persyn.workers.cluster import app as celery_app
from tests.cluster import Broker, Cluster
from tests.postgres import Postgres
from tests.run_files import write_run

TEACHERS = ("ada", "bob", "cyd", "dee")
WORKERS = ("one", "two", "three")
DISPATCHERS = ("lead", "second")
LEASE_SECONDS = 4.0
CONCURRENCY = 8
LATENCY_SECONDS = 0.15
CALIBRATION = 60
_POLL_SECONDS = 0.1
#: Between two sweeps, including allowances for a busy machine, a database outage and a frozen leader.
_SWEEP_SECONDS = 16.0
#: How long a leader or connection is frozen: longer than the leader's lease and than a job's lease.
_FROZEN_SECONDS = 8.0
#: Probability that the worker fitting the router is suspended.
_SUSPENDED_FITS = 0.7
#: Size of the file system for the store's tables.
_DISK_MIB = 256
_LIMIT_SECONDS = 600.0


@dataclass(slots=True)
class Outcome:
    """The result of a round."""

    seed: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    duplicate: int = 0
    twice: int = 0
    #: The longest time without a new response while responses were pending.
    longest_pause: float = 0.0
    #: The longest time from a worker's last sign of life to the requeueing of its job.
    longest_recovery: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        return (
            f"seed {self.seed}: {self.seconds:.0f} s, {sum(self.faults.values())} faults ({faults}); "
            f"lost {self.lost}, duplicate {self.duplicate}, generated twice {self.twice}, "
            f"longest recovery {self.longest_recovery:.1f} s, longest pause {self.longest_pause:.1f} s"
            f"{''.join(f'{chr(10)}  PROBLEM {text}' for text in self.problems)}"
        )


class Chaos:
    """One round: a cluster, and the faults injected into it."""

    def __init__(self, folder: Path, postgres: Postgres, broker: Broker, seed: int, disk: Path | None = None) -> None:
        self.outcome = Outcome(seed)
        self._random = random.Random(seed)
        self._postgres = postgres
        self._broker = broker
        self._journal = folder / "journal"
        self._file = folder
        self._disk = disk
        self._url = postgres.create(f"chaos{seed}", tablespace=disk)
        self._proxies = {}
        self._through = {}
        for name in (WORKERS[0], DISPATCHERS[0]):
            self._through[name], self._proxies[name] = postgres.behind(self._url)
        self._cluster = Cluster(folder, self._url, broker, PERSYN_LEASE_SECONDS=str(LEASE_SECONDS))
        #: (end, function that ends the freeze).
        self._frozen: list[tuple[float, Callable[[], None]]] = []
        self._met_fit = False
        self._faults: list[Callable[[], None]] = [
            self.kill_worker,
            self.kill_worker,
            self.kill_host,
            self.kill_dispatcher,
            self.freeze_worker,
            self.kill_broker,
            self.wipe_broker,
            self.cut_database,
            self.restart_database,
            self.repeat_messages,
            self.freeze_leader,
            self.freeze_connection,
            self.make_read_only,
            self.fill_broker,
            *([self.fill_disk] if disk else []),
        ]

    def run(self, prompts: int) -> Outcome:
        """Work a run under faults until it ends, then count losses and duplicates."""
        began = time.monotonic()
        database = Database(self._url)
        database.upgrade()
        options = {"latency_seconds": LATENCY_SECONDS, "concurrency": CONCURRENCY, "journal": str(self._journal)}
        file = write_run(
            self._file,
            prompts=prompts,
            teachers=TEACHERS,
            calibration=CALIBRATION,
            job_prompts=64,
            options=options,
            fit_seconds=3.0,
        )
        with database.write() as session:
            pipeline.start_run(session, run_file.read(file), actor="chaos")
        try:
            for name in DISPATCHERS:
                self._start_dispatcher(name)
            for name in WORKERS:
                self._start_worker(name)
            self._hurt_until_done(database)
            self._count(database, prompts)
        finally:
            self._thaw(float("inf"))
            self._cluster.stop()
            for proxy in self._proxies.values():
                proxy.close()
            database.close()
        self._require_no_orphans()
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def kill_worker(self) -> None:
        """SIGKILL a worker; its engine must end with it."""
        name = self._random.choice(WORKERS)
        self._cluster.kill(name)
        self._start_worker(name)

    def kill_host(self) -> None:
        """SIGKILL an engine of a running worker."""
        hosts = list(self._hosts())
        if hosts:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._random.choice(sorted(hosts, key=lambda host: host.pid)).kill()

    def kill_dispatcher(self) -> None:
        """SIGKILL a dispatcher, which may be the leader."""
        name = self._random.choice(DISPATCHERS)
        self._cluster.kill(name)
        self._start_dispatcher(name)

    def freeze_worker(self) -> None:
        """Suspend a worker for longer than its lease; after resuming it must not write any results of its lost jobs."""
        pid = self._cluster.processes[self._random.choice(WORKERS)].pid
        self._suspend([psutil.Process(pid)], 1.5 * LEASE_SECONDS)

    def freeze_leader(self) -> None:
        """Suspend the leading dispatcher, so that the other one takes over."""
        for name in DISPATCHERS:
            pid = self._cluster.processes[name].pid
            if f"/{pid}/" in self._leader():
                self._suspend([psutil.Process(pid)], _FROZEN_SECONDS)

    def freeze_connection(self) -> None:
        """Neither forward nor close a process's connections to the database."""
        proxy = self._random.choice(list(self._proxies.values()))
        proxy.freeze()
        self._frozen.append((time.monotonic() + _FROZEN_SECONDS, proxy.thaw))

    def suspend_fit(self, owner: str) -> None:
        """Suspend the worker that fits the router, with its engine, until another worker has fitted it."""
        for name in WORKERS:
            pid = self._cluster.processes[name].pid
            if f"/{pid}/" in owner:
                worker = psutil.Process(pid)
                self._suspend([worker, *worker.children(recursive=True)], 3 * LEASE_SECONDS)

    def make_read_only(self) -> None:
        """Make the database reject writes for some seconds."""
        self._postgres.set_read_only(True)
        time.sleep(self._random.uniform(1, 3))
        self._postgres.set_read_only(False)

    def fill_disk(self) -> None:
        """Fill the disk of the store's tables for some seconds."""
        assert self._disk is not None
        filler = self._disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 2**16)
        time.sleep(self._random.uniform(1, 3))
        filler.unlink()

    def fill_broker(self) -> None:
        """Make the broker reject messages for lack of memory for some seconds."""
        with self._broker.client() as client:
            client.config_set("maxmemory", 1)
            time.sleep(self._random.uniform(1, 3))
            client.config_set("maxmemory", 0)

    def kill_broker(self) -> None:
        """Kill the broker with all its messages, and restart it after a second."""
        self._broker.kill()
        time.sleep(1)
        self._broker.start()

    def wipe_broker(self) -> None:
        """Delete every message."""
        self._broker.wipe()

    def cut_database(self) -> None:
        """Terminate every connection to the database."""
        self._postgres.cut()

    def restart_database(self) -> None:
        """Crash the database and restart it."""
        self._postgres.restart()

    def repeat_messages(self) -> None:
        """Send messages for random jobs again, in random order."""
        database = Database(self._url)
        with database.read() as session:
            jobs = session.execute(select(Job.id, Job.queue)).all()
        database.close()
        app = celery_app.make(self._broker.url)
        for job in self._random.sample(jobs, min(10, len(jobs))):
            celery_app.notify(app, job.queue, [job.id], most=1000)
        app.close()

    def _hurt_until_done(self, database: Database) -> None:
        began = moved = time.monotonic()
        stage = ""
        seen, due = 0, began + self._random.uniform(2, 5)
        while True:
            now = time.monotonic()
            self._thaw(now)
            found = self._look(database)
            if found is not None:
                state, responses, stage = found
                if responses != seen:
                    self.outcome.longest_pause = max(self.outcome.longest_pause, now - moved)
                    seen, moved = responses, now
                if state is not RunState.RUNNING:
                    return
                self._meet_fit(database)
            self._revive()
            if now > due:
                fault = self._random.choice(self._harmless() if stage == "fit_router" else self._faults)
                self._note(fault.__name__)
                fault()
                due = time.monotonic() + self._random.uniform(1, 4)
            if now - began > _LIMIT_SECONDS:
                self.outcome.problems.append(f"not over after {_LIMIT_SECONDS:.0f} s")
                return
            time.sleep(_POLL_SECONDS)

    def _harmless(self) -> list[Callable[[], None]]:
        """Faults that cost no lease: a fit saves no intermediate results, and fails by design with its third loss."""
        return [fault for fault in self._faults if fault not in (self.freeze_worker, self.freeze_connection)]

    def _note(self, fault: str) -> None:
        self.outcome.faults[fault] = self.outcome.faults.get(fault, 0) + 1

    def _meet_fit(self, database: Database) -> None:
        """Suspend the worker that fits the router with some probability."""
        if self._met_fit:
            return
        with contextlib.suppress(DBAPIError), database.read() as session:
            fits = Job.stage == "fit_router", Job.state == JobState.RUNNING
            if (owner := session.scalar(select(Job.owner).where(*fits))) is not None:
                self._met_fit = True
                if self._random.random() < _SUSPENDED_FITS:
                    self._note("suspend_fit")
                    self.suspend_fit(owner)

    def _leader(self) -> str:
        database = Database(self._url)
        try:
            with database.read() as session:
                return session.scalar(select(Leader.owner)) or ""
        except DBAPIError:
            return ""
        finally:
            database.close()

    def _revive(self) -> None:
        """Restart processes that ended by themselves, as a service manager does."""
        for name, process in list(self._cluster.processes.items()):
            if process.poll() is not None:
                self._note("ended_by_itself")
                (self._start_worker if name in WORKERS else self._start_dispatcher)(name)

    @staticmethod
    def _look(database: Database) -> tuple[RunState, int, str] | None:
        """The run's state, the number of responses, and its stage; None while the database is unavailable."""
        try:
            with database.read() as session:
                state, stage = session.execute(select(Run.state, Run.stage)).one()
                return state, session.scalars(select(func.count()).select_from(Response)).one(), stage
        except Exception:
            return None

    def _count(self, database: Database, prompts: int) -> None:
        needed = CALIBRATION * len(TEACHERS) + prompts - CALIBRATION
        with database.read() as session:
            run = session.scalars(select(Run)).one()
            rows = session.scalars(select(func.count()).select_from(Response)).one()
            keys = select(Response.prompt_id, Response.teacher_id, Response.sample).distinct().subquery()
            distinct = session.scalars(select(func.count()).select_from(keys)).one()
            if run.state is not RunState.DONE:
                self.outcome.problems.append(f"the run ended as {run.state.value}: {run.error}")
            running = session.scalars(select(func.count()).where(Job.state == JobState.RUNNING)).one()
            if running:
                self.outcome.problems.append(f"{running} jobs still run")
            silences = session.scalars(select(Event.detail["silent_seconds"].as_float()).join(Job)).all()
            self.outcome.longest_recovery = max([0.0, *(seconds for seconds in silences if seconds is not None)])
            findings = audit.audit(session, run)
            self.outcome.problems += [f"{finding.rule}, {finding.about}: {finding.found}" for finding in findings]
            for path, sha256 in session.execute(select(Router.path, Router.sha256)):
                checkpoint = self._file / "home" / path / "router.msgpack"
                if hashlib.sha256(checkpoint.read_bytes()).hexdigest() != sha256:
                    self.outcome.problems.append(f"the router's checkpoint {path} is not the one that was fitted")
        # After a database outage, leases expire no earlier than one lease time after it ended.
        if self.outcome.longest_recovery > 2 * LEASE_SECONDS + _SWEEP_SECONDS:
            self.outcome.problems.append(f"a job was taken back after {self.outcome.longest_recovery:.1f} s")
        self.outcome.lost, self.outcome.duplicate = needed - distinct, rows - distinct
        asked = [line for line in self._journal.read_text().splitlines() if line.endswith('"]')]
        self.outcome.twice = len(asked) - len(set(asked))
        # The possible cost of a death: an engine's window is twice its concurrency.
        fatal = ("kill_worker", "kill_host", "freeze_worker", "freeze_connection", "suspend_fit", "ended_by_itself")
        deaths = sum(self.outcome.faults.get(name, 0) for name in fatal)
        if self.outcome.twice > 2 * CONCURRENCY * deaths:
            self.outcome.problems.append(f"{self.outcome.twice} generated twice in {deaths} deaths")

    def _start_worker(self, name: str) -> None:
        self._cluster.worker(name, skew=self._skew(), PERSYN_DATABASE_URL=self._through.get(name, self._url))

    def _start_dispatcher(self, name: str) -> None:
        through = self._through.get(name, self._url)
        self._cluster.start(name, "dispatch", skew=self._skew(), PERSYN_DATABASE_URL=through)

    def _skew(self) -> float:
        """The clock offset of the next process; leases are a hundredth of it."""
        return self._random.choice((0.0, -100.0, 100.0)) * LEASE_SECONDS

    def _suspend(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        self._frozen.append((time.monotonic() + seconds, lambda: _resume(processes)))

    def _thaw(self, now: float) -> None:
        for until, thaw in self._frozen:
            if until <= now:
                thaw()
        self._frozen = [item for item in self._frozen if item[0] > now]

    def _hosts(self) -> Iterator[psutil.Process]:
        """The engines of this round's workers."""
        for name in WORKERS:
            with contextlib.suppress(psutil.NoSuchProcess):
                yield from psutil.Process(self._cluster.processes[name].pid).children()

    def _require_no_orphans(self) -> None:
        home = str(self._file)
        deadline = time.monotonic() + 5
        while orphans := [p for p in psutil.process_iter(["cwd", "cmdline"]) if (p.info["cwd"] or "").startswith(home)]:
            if time.monotonic() > deadline:
                self.outcome.problems.append(f"orphans: {[p.info['cmdline'] for p in orphans]}")
                for orphan in orphans:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        os.kill(orphan.pid, signal.SIGKILL)
                return
            time.sleep(0.1)


def _resume(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


@contextlib.contextmanager
def _small_disk(postgres: Postgres) -> Iterator[Path | None]:
    """A small file system for the store's tables; None if this user cannot create one."""
    folder = Path(tempfile.mkdtemp(prefix="persyn-disk-"))
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", folder], capture_output=True)
    try:
        if made.returncode == 0:
            postgres.own(folder)
        yield folder if made.returncode == 0 else None
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def round_of(seed: int, prompts: int) -> Outcome:
    """Run one round from setup to teardown."""
    broker = Broker()
    broker.start()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="persyn-chaos-") as name,
            Postgres.running() as postgres,
            _small_disk(postgres) as disk,
        ):
            return Chaos(Path(name), postgres, broker, seed, disk).run(prompts)
    finally:
        broker.kill()


def main() -> None:
    """Run the rounds; exit 1 if anything was lost, duplicated or left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=5_000)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all started processes are ended on exit
    failed = False
    for seed in range(options.seed, options.seed + options.rounds):
        outcome = round_of(seed, options.prompts)
        print(outcome, flush=True)
        failed |= bool(outcome.problems or outcome.lost or outcome.duplicate)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
