"""An interface for observing the progress of workers in this process."""

from __future__ import annotations

import threading

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.llm.protocols import ModelSpec
from persyn.stages.batch import Progress
from persyn.stages.registry import STAGES


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
    """Counts the saved rows of a run's stages; the store is read once per stage."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        #: By stage.
        self._counts: dict[str, Progress] = {}
        self._lock = threading.Lock()

    def saved(self, stage: str, done: int, failed: int) -> None:
        """Add saved rows to the counts."""
        with self._lock:
            if stage not in self._counts:
                # The store's counts include these rows already.
                found = self._read(stage)
                self._counts[stage] = Progress(found.total, found.done - done, found.failed - failed)
                self.counted(stage, self._counts[stage])
            before = self._counts[stage]
            n_failed = before.failed + failed
            # Rows that another worker was storing during the first count may be counted twice.
            self._counts[stage] = Progress(before.total, min(before.done + done, before.total - n_failed), n_failed)
            self.counted(stage, self._counts[stage])

    def counted(self, stage: str, counts: Progress) -> None:
        """Called with the new counts of a stage, from one thread at a time."""

    def _read(self, stage: str) -> Progress:
        with self._database.read() as session:
            return STAGES[stage].progress(session, session.get_one(Run, self._run_id))
