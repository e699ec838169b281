"""Roll call: ask the workers which are up and at which version, and find queues that none of them takes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.worker.control import inspect_command

from persyn.jobs.workload import Backlog
from persyn.workers.runner.affinity import Reach

_COMMAND = "persyn"
_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class PresentWorker:
    """A worker that answered: its name at the broker, its PerSyn version, and the jobs it takes."""

    host: str
    version: str
    reach: Reach


def version() -> str:
    """PerSyn's version in this process."""
    return importlib.metadata.version("persyn")


def answer_roll(reach: Reach) -> None:
    """Make this process's worker answer roll calls."""
    running = version()  # read now, because an upgrade may be installed while this process runs

    @inspect_command(name=_COMMAND)  # type: ignore[untyped-decorator]
    def tell(state: Any, **_: Any) -> dict[str, Any]:
        gpus = None if reach.gpus is None else list(reach.gpus)
        return {"version": running, "gpus": gpus, "queues": list(reach.queues)}


def call_roll(app: Celery) -> list[PresentWorker]:
    """The workers that answer within two seconds, sorted by name; their answers are untrusted and only displayed.

    Raises one of `persyn.workers.cluster.app.BROKER_ERRORS` when the broker does not answer.
    """
    replies = app.control.broadcast(_COMMAND, reply=True, timeout=_SECONDS)
    said = {host: what for reply in replies for host, what in reply.items() if isinstance(what, Mapping)}
    return [_present(host, what) for host, what in sorted(said.items())]


def untaken(backlogs: Iterable[Backlog], present: Collection[PresentWorker]) -> list[Backlog]:
    """The backlogs that none of these workers takes."""
    return [backlog for backlog in backlogs if not any(worker.reach.fits(backlog) for worker in present)]


def _present(host: str, what: Mapping[str, Any]) -> PresentWorker:
    gpus, queues = what.get("gpus"), what.get("queues") or ()
    reach = Reach(None if gpus is None else tuple(map(str, gpus)), tuple(map(str, queues)))
    # A worker of another version may not support the question.
    return PresentWorker(host, str(what.get("version", "of an unknown version")), reach)
