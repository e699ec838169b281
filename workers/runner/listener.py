"""An interface for observing the progress of workers in this process."""

from __future__ import annotations

import math
import threading
import time

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.llm.protocols import ModelSpec
from persyn.stages.batch import Progress
from persyn.stages.registry import STAGES

#: How often a stage's rows are counted in the store while results arrive.
_READ_SECONDS = 1.0


class Listener:
    """Receives workers' events and ignores them; subclasses override. Each worker calls from its own thread."""

    def loading(self, spec: ModelSpec) -> None:
        """A model starts to load."""

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """A model is in memory."""

    def saved(self, stage: str, done: int, failed: int) -> None:
        """More rows are saved, this many done and failed."""

    def idle(self, spec: ModelSpec) -> None:
        """A model has no more work at present."""

    def waiting(self, reason: str) -> None:
        """A server is unavailable and will be retried later."""


class Counter(Listener):
    """Counts the saved rows of a run's stages.

    The store is read once per stage, or now and then where the number of saved results says nothing of the rows.
    """

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        #: By stage.
        self._counts: dict[str, Progress] = {}
        #: Stages that are counted in the store, and when that was last done.
        self._read_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def saved(self, stage: str, done: int, failed: int) -> None:
        """Add saved rows to the counts."""
        with self._lock:
            if stage in self._read_at:
                self._count(stage, after_seconds=_READ_SECONDS)
                return
            if stage not in self._counts:
                found, is_exact = self._read(stage)
                if not is_exact:
                    self._count(stage)
                    return
                # The store's counts include these rows already.
                self._counts[stage] = Progress(found.total, found.done - done, found.failed - failed)
                self.counted(stage, self._counts[stage])
            before = self._counts[stage]
            n_failed = before.failed + failed
            # Rows that another worker was storing during the first count may be counted twice.
            self._counts[stage] = Progress(before.total, min(before.done + done, before.total - n_failed), n_failed)
            self.counted(stage, self._counts[stage])

    def idle(self, spec: ModelSpec) -> None:
        """Count what was saved since the store was last read."""
        with self._lock:
            for stage in self._read_at:
                self._count(stage)

    def _count(self, stage: str, *, after_seconds: float = 0.0) -> None:
        if time.monotonic() - self._read_at.get(stage, -math.inf) >= after_seconds:
            self._counts[stage], _ = self._read(stage)
            self._read_at[stage] = time.monotonic()
            self.counted(stage, self._counts[stage])

    def counted(self, stage: str, counts: Progress) -> None:
        """Called with the new counts of a stage, from one thread at a time."""

    def _read(self, stage: str) -> tuple[Progress, bool]:
        """The store's counts, and whether each saved result adds one."""
        with self._database.read() as session:
            run = session.get_one(Run, self._run_id)
            return STAGES[stage].progress(session, run), STAGES[stage].counts_results(run)
