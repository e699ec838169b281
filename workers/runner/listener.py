"""Whoever wants to see work go on in this process."""

from __future__ import annotations

import threading

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.llm.protocols import ModelSpec
from persyn.runs import pipeline
from persyn.stages.batch import Progress


class Listener:
    """Is told what workers do; this one does nothing with it. Several workers tell from a thread each."""

    def loading(self, spec: ModelSpec) -> None:
        """A model begins to load."""

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """It is in memory."""

    def saved(self, stage: str, done: int, failed: int) -> None:
        """So many rows more are written."""

    def waiting(self, reason: str) -> None:
        """A server is away, and is asked again later."""


class Counter(Listener):
    """Counts the rows of a run's stages as they are written, without counting them in the store each time."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        #: By stage.
        self._counts: dict[str, Progress] = {}
        self._lock = threading.Lock()

    def saved(self, stage: str, done: int, failed: int) -> None:
        """So many rows more are written."""
        with self._lock:
            if stage not in self._counts:
                # The store has counted these rows already.
                found = self._read(stage)
                self._counts[stage] = Progress(found.total, found.done - done, found.failed - failed)
                self.counted(stage, self._counts[stage])
            before = self._counts[stage]
            n_failed = before.failed + failed
            # Rows that another worker was writing when the store was first asked are counted twice.
            self._counts[stage] = Progress(before.total, min(before.done + done, before.total - n_failed), n_failed)
            self.counted(stage, self._counts[stage])

    def counted(self, stage: str, counts: Progress) -> None:
        """Called with the new counts of a stage, from one thread at a time."""

    def _read(self, stage: str) -> Progress:
        with self._database.read() as session:
            return pipeline.STAGES[stage].progress(session, session.get_one(Run, self._run_id))
