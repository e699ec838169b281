"""Choose and claim a worker's next job."""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.jobs import queue, workload
from persyn.jobs.queue import Claim
from persyn.jobs.workload import Backlog
from persyn.workers.runner import affinity
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.ledger import Ledger

#: Key of the advisory lock under which workers choose a queue; an arbitrary unique number.
_CLAIM_LOCK = 0x5045525359
#: How long a worker's computed share of the remaining work stays valid.
_MOMENT_SECONDS = 2.0


class Claims:
    """Claims jobs for one worker, each in the caller's transaction.

    run_id: only this run's jobs; None means any.
    ledger: state shared with the other workers of the process.
    """

    def __init__(self, owner: str, reach: Reach, ledger: Ledger, *, run_id: int | None, lease: timedelta) -> None:
        self._owner = owner
        self._reach = reach
        self._ledger = ledger
        self._run_id = run_id
        self._lease = lease
        #: Prompts left per worker, and when that was computed.
        self._share, self._shared_at = 0.0, float("-inf")
        #: The current queue: whether its model needs GPUs, and the number of prompts per job.
        self._on_gpus, self._job_prompts = False, 1.0
        #: Whether jobs of a higher priority wait in another queue whose model this worker should load.
        self._is_outranked = False

    def first(self, session: Session, loaded: str | None, known: Collection[int]) -> Claim | None:
        """Claim the first job of the best queue and reserve its model's GPUs; None if no job can be claimed.

        loaded: the queue whose model is in memory.
        known:  the jobs the worker knows it holds; others held under its name are released.
        """
        _lock(session)
        queue.release_unknown(session, owner=self._owner, known=known)
        backlogs = {backlog.queue: backlog for backlog in self._look(session)}
        for name in affinity.order(backlogs.values(), loaded, self._reach):
            gpus, is_light = backlogs[name].gpus, backlogs[name].is_light
            if self._is_to_be_had(backlogs[name]) and (claim := self._claim(session, name)) is not None:
                self._ledger.take(self._owner, name, gpus, is_light=is_light)
                self._on_gpus, self._shared_at = gpus > 0, float("-inf")
                self._job_prompts = backlogs[name].prompts / backlogs[name].jobs
                return claim
        return None

    def is_enough(self, at_hand: int, window: int) -> bool:
        """Whether a worker has its share of the remaining work, as recently computed.

        at_hand: number of requests it holds.
        window:  the engine's window, about twice what it computes at a time.
        """
        if at_hand >= window:
            return True
        if time.monotonic() - self._shared_at > _MOMENT_SECONDS:
            return False
        # Enough to fill the engine, if that much is left per worker; beyond that, half the share, because other
        # workers may be faster. Half a job is the average rounding error.
        most = max(self._share / 2, min(self._share, window / 2))
        return at_hand > 0 and at_hand + self._job_prompts / 2 > most

    def next(self, session: Session, name: str, at_hand: int, window: int) -> Claim | None:
        """Claim another job of the worker's current queue.

        None when there is none, the worker has its share, it is another model's turn, or more urgent jobs wait.
        """
        if self._ledger.is_avoided(name):
            return None
        if self._ledger.is_to_look():
            self._look(session, at=name)
        if time.monotonic() - self._shared_at > _MOMENT_SECONDS:
            self._share = workload.share(session, on_gpus=self._on_gpus, run_id=self._run_id)
            self._shared_at = time.monotonic()
        if self._is_outranked or self._ledger.is_asked(self._owner) or self.is_enough(at_hand, window):
            return None
        return self._claim(session, name)

    def _look(self, session: Session, at: str | None = None) -> list[Backlog]:
        """Read the backlogs, and tell the ledger which unserved queues this process could work.

        at: a queue that the worker has jobs of.
        """
        backlogs = workload.backlogs(session, run_id=self._run_id, besides=self._owner)
        others = [backlog for backlog in backlogs if backlog.queue != at and self._reach.fits(backlog)]
        here = [backlog for backlog in others if not self._ledger.is_avoided(backlog.queue)]
        idle = (backlog for backlog in here if not backlog.workers and not backlog.is_light)
        self._ledger.note_waiting({backlog.queue: backlog.gpus for backlog in idle})
        own = next((backlog.priority for backlog in backlogs if backlog.queue == at), None)
        urgent = (backlog for backlog in here if own is not None and backlog.priority < own)
        self._is_outranked = any(affinity.is_worth_a_load(each) and self._is_to_be_had(each) for each in urgent)
        return backlogs

    def _is_to_be_had(self, backlog: Backlog) -> bool:
        name, gpus = backlog.queue, backlog.gpus
        has_room = self._ledger.has_room(self._owner, name, gpus, is_light=backlog.is_light)
        return has_room and not self._ledger.is_avoided(name)

    def _claim(self, session: Session, name: str) -> Claim | None:
        return queue.claim(session, owner=self._owner, queue=name, run_id=self._run_id, lease=self._lease)


def _lock(session: Session) -> None:
    """Serialise the workers' choice of queues until the commit, so that each sees the previous claims."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite allows one writer at a time anyway
        session.execute(select(func.pg_advisory_xact_lock(_CLAIM_LOCK)))
