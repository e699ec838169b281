"""Choose the queue a worker works next: of the highest priority its loaded model's, then that with most unserved work.

Loading a model is expensive, so a worker stays on its queue until it is empty, and joins a queue
with other workers only if it holds more jobs than they will soon have started.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from persyn.jobs.workload import Backlog

#: A queue is shared when more than this many jobs per worker are waiting.
_JOBS_WORTH_A_LOAD = 2


@dataclass(frozen=True, slots=True)
class Reach:
    """What one worker can run.

    gpus:   the ids of its GPUs, as in CUDA_VISIBLE_DEVICES; None means unpinned: it uses all GPUs and
            is alone on the machine.
    queues: parts of queue names, at least one of which must occur; empty means all queues.
    """

    gpus: tuple[str, ...] | None = None
    queues: tuple[str, ...] = ()

    def fits(self, backlog: Backlog) -> bool:
        """Whether a queue's model fits this worker's GPUs and matches its queue filter."""
        has_gpus = self.gpus is None or backlog.gpus <= len(self.gpus)
        return has_gpus and (not self.queues or any(part in backlog.queue for part in self.queues))


def order(backlogs: Collection[Backlog], loaded: str | None, reach: Reach) -> list[str]:
    """The queues to try, best first.

    loaded: the queue whose model is in memory.
    """
    mine = [backlog for backlog in backlogs if reach.fits(backlog) and backlog.jobs]
    by_priority = groupby(sorted(mine, key=_priority), key=_priority)
    return [name for _, equal in by_priority for name in _order(list(equal), loaded)]


def is_worth_a_load(backlog: Backlog) -> bool:
    """Whether another worker should load a queue's model: nobody serves it, or it is long for those who do."""
    return not backlog.workers or backlog.jobs > _JOBS_WORTH_A_LOAD * backlog.workers


def _order(mine: Sequence[Backlog], loaded: str | None) -> list[str]:
    staying = [backlog for backlog in mine if backlog.queue == loaded]
    others = [backlog for backlog in mine if backlog.queue != loaded and is_worth_a_load(backlog)]
    free = [backlog for backlog in others if not backlog.workers]
    shared = [backlog for backlog in others if backlog.workers]
    return _names(staying) + _names(sorted(free, key=_size)) + _names(sorted(shared, key=_need))


def _priority(backlog: Backlog) -> int:
    return backlog.priority


def _size(backlog: Backlog) -> tuple[int, int, str]:
    """Sort key: the most GPUs first, since later too few may be free; then the most prompts."""
    return -backlog.gpus, -backlog.prompts, backlog.queue


def _need(backlog: Backlog) -> tuple[bool, float, int, str]:
    """Sort key: GPU models first, if the worker has GPUs; then the most prompts per worker."""
    return not backlog.gpus, -backlog.prompts / (backlog.workers + 1), -backlog.gpus, backlog.queue


def _names(backlogs: Sequence[Backlog]) -> list[str]:
    return [backlog.queue for backlog in backlogs]
