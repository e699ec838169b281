"""The methods of a run in Python that change it as a whole: pause it, set its priority, rename and delete it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from persyn.db import catalog, lookup
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.jobs import owner
from persyn.operations.deletion import Deletion, DeletionOptions, delete_run
from persyn.operations.renaming import rename
from persyn.runs import pipeline, scheduling
from persyn.settings import Settings


class RunOperations:
    """What is done to a run as a whole; the base of `persyn.Run`."""

    _database: Database
    _settings: Settings
    _id: int
    #: Its name, unique in the store.
    name: str

    def cancel(self) -> None:
        """Stop the run; finished rows are kept, and `resume` continues it. Raises `UsageError` if it has ended."""
        with self._write() as (session, run):
            pipeline.cancel(session, run, actor=owner.actor())

    def pause(self, reason: str | None = None) -> None:
        """Stop the run until `resume`: no job is claimed, and workers give back those they hold, with results saved.

        Raises `UsageError` if it is not running.
        """
        with self._write() as (session, run):
            scheduling.pause(session, run, actor=owner.actor(), why=reason)

    @property
    def priority(self) -> int:
        """Jobs of runs with a higher priority are claimed first; from -1000 to 1000, 0 for a new run."""
        with self._read() as (_, run):
            return run.priority

    @priority.setter
    def priority(self, value: int) -> None:
        with self._write() as (session, run):
            scheduling.prioritise(session, run, value, actor=owner.actor())

    def rename(self, name: str) -> None:
        """Give the run another name, also while it is worked; its datasets in the store's home move to the new folder.

        Raises `UsageError` for a name that is taken or invalid.
        """
        rename(self._database, self._id, name, self._settings.home, actor=owner.actor())
        self.name = name

    def delete(self, *, responses: bool = False, abandon_batches: bool = False) -> Deletion:
        """Delete the run and what only it has; returns what was deleted and kept. Call it again if it was interrupted.

        responses:       also delete generated responses that no other run needs. The default keeps them for later runs.
        abandon_batches: delete the run although a provider has batches of it, whose results are lost and may be billed.

        Raises `UsageError` while workers hold jobs of the run, and for batches that were not collected.
        """
        options = DeletionOptions(responses, abandon_batches)
        return delete_run(self._database, self._id, self._settings.home, actor=owner.actor(), options=options)

    @contextmanager
    def _read(self) -> Iterator[tuple[Session, catalog.Run]]:
        with self._database.read() as session:
            yield session, self._row(session)

    @contextmanager
    def _write(self) -> Iterator[tuple[Session, catalog.Run]]:
        with self._database.write() as session:
            yield session, self._row(session)

    def _row(self, session: Session) -> catalog.Run:
        run = session.get(catalog.Run, self._id)
        if run is None:
            raise UsageError(f"run {self.name} is no longer in the store")
        lookup.require_whole(run)
        return run
