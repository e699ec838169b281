"""Run several workers in one process, so that as many models as fit are served at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import TracebackType

from persyn.config import RunConfig, load_config
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.llm import engines
from persyn.llm import gpus as gpu_list
from persyn.runs.checks import models
from persyn.settings import Settings
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.ledger import Ledger
from persyn.workers.runner.listener import Listener
from persyn.workers.runner.worker import Worker

#: Maximum number of models behind servers and of checkers that a process works beside those on its GPUs and its CPU.
_MOST_LIGHT = 16


class Crew:
    """One worker per GPU, or one without GPUs, and others for light models, each with its own engine host.

    Any of them takes any model. They share the GPUs and the CPU according to their models' needs: some work while
    others wait. Setting `stopping` asks all of them to stop once finished results are stored.

    light: number of light models to work beside the others.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        reach: Reach,
        *,
        run_id: int | None = None,
        light: int = 0,
        listener: Listener | None = None,
    ) -> None:
        ledger = Ledger(reach.gpus)
        self.workers = [
            Worker(database, settings, run_id=run_id, reach=reach, listener=listener, ledger=ledger)
            for _ in range(max(1, len(reach.gpus or ())) + light)
        ]
        self.stopping = threading.Event()
        for worker in self.workers:
            worker.stop = self.stopping
        self._idle = list(self.workers)
        self._lock = threading.Lock()

    @classmethod
    def of_run(cls, database: Database, settings: Settings, run_id: int, listener: Listener | None = None) -> Crew:
        """The workers that work one run in this process, on the GPUs that its models share."""
        with database.read() as session:
            config = load_config(session.get_one(Run, run_id).config)
        light = min(models.count_light(config), _MOST_LIGHT)
        return cls(database, settings, Reach(_shared_gpus(config)), run_id=run_id, light=light, listener=listener)

    def __enter__(self) -> Crew:
        for worker in self.workers:
            worker.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # In parallel, since each may wait a minute for GPU memory.
        with ThreadPoolExecutor(len(self.workers)) as pool:
            left = [pool.submit(worker.__exit__, kind, error, at) for worker in self.workers]
        for leaving in left:
            leaving.result()

    def run(self) -> None:
        """Work until the run is over or, without a run, until no job is left. Then raises a worker's error, if any."""
        if len(self.workers) == 1:
            self.workers[0].run()
            return
        with ThreadPoolExecutor(len(self.workers)) as pool:
            ends = [pool.submit(worker.run) for worker in self.workers]
            wait(ends, return_when=FIRST_EXCEPTION)
            if any(end.done() and end.exception() for end in ends):
                self.stopping.set()
        for end in ends:
            end.result()

    def work(self, queue: str | None = None) -> None:
        """Let an idle worker work until it finds no more jobs; prefers the one whose engine is of this queue.

        May be called by at most as many threads as there are workers.
        """
        with self._lock:
            worker = min(self._idle, key=lambda idle: (idle.queue != queue, idle.queue is not None))
            self._idle.remove(worker)
        try:
            worker.work()
        finally:
            with self._lock:
                self._idle.append(worker)

    def end(self) -> None:
        """Stop all workers even if the database does not answer; see `Worker.end`."""
        for worker in self.workers:
            worker.end()


def _shared_gpus(config: RunConfig) -> tuple[str, ...] | None:
    """The GPUs shared by a run's models; None to give all visible GPUs to one model after the other.

    None also applies with at most one GPU, or fewer than a model needs: its engine then reports what is missing.
    """
    gpus = gpu_list.visible()
    teachers = [teacher.gpus for teacher in config.teachers if not engines.is_light(teacher.engine, teacher.options)]
    student = [config.student.gpus] if config.student else []
    most = max(config.router.gpus, *student, *(scorer.gpus for scorer in config.scorers), *teachers)
    return gpus if len(gpus) > 1 and len(gpus) >= most else None
