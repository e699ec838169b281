"""Which model a worker works next: the one it has loaded, then the longest queue that nobody works.

Loading a model is what costs, so a worker stays on its queue until that is drained, and a queue
that others work is joined only while it holds more jobs than they will soon have begun.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from persyn.jobs.queue import Backlog

#: A queue is shared when more than this many jobs wait for each worker on it.
_JOBS_WORTH_A_LOAD = 2


@dataclass(frozen=True, slots=True)
class Reach:
    """What one worker can do.

    gpus:   the ids of its GPUs, as CUDA_VISIBLE_DEVICES names them; None is a worker that does not pin, takes all,
            and has the machine to itself.
    queues: parts of queue names, of which one must occur; empty takes all.
    """

    gpus: tuple[str, ...] | None = None
    queues: tuple[str, ...] = ()

    def fits(self, backlog: Backlog) -> bool:
        """Whether a queue's model fits this worker's GPUs and is one it was started for."""
        has_gpus = self.gpus is None or backlog.gpus <= len(self.gpus)
        return has_gpus and (not self.queues or any(part in backlog.queue for part in self.queues))


def order(backlogs: Collection[Backlog], loaded: str | None, reach: Reach) -> list[str]:
    """The queues to try, best first.

    loaded: the queue whose model is in memory.
    """
    mine = [backlog for backlog in backlogs if reach.fits(backlog) and backlog.jobs]
    staying = [backlog for backlog in mine if backlog.queue == loaded]
    others = [backlog for backlog in mine if backlog.queue != loaded]
    free = [backlog for backlog in others if not backlog.workers]
    shared = [backlog for backlog in others if backlog.workers and backlog.jobs > _JOBS_WORTH_A_LOAD * backlog.workers]
    return _names(staying) + _names(sorted(free, key=_size)) + _names(sorted(shared, key=_need))


def _size(backlog: Backlog) -> tuple[int, int, str]:
    """What needs the most GPUs comes first: later there would be too few of them free. Then the most prompts."""
    return -backlog.gpus, -backlog.prompts, backlog.queue


def _need(backlog: Backlog) -> tuple[bool, float, int, str]:
    """Whatever needs GPUs comes first where there are some; then what has the most prompts for each worker."""
    return not backlog.gpus, -backlog.prompts / (backlog.workers + 1), -backlog.gpus, backlog.queue


def _names(backlogs: Sequence[Backlog]) -> list[str]:
    return [backlog.queue for backlog in backlogs]
