"""A Celery worker for one group of GPUs: messages wake it, the database decides what it does.

The Celery process does not import torch; models live in the engine hosts of its `Crew`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

from celery import Celery, signals
from celery.worker import state
from sqlalchemy.exc import DBAPIError

from persyn.db.connect import Database
from persyn.errors import shorten
from persyn.jobs import workload
from persyn.settings import Settings
from persyn.workers.cluster import app as celery_app
from persyn.workers.cluster import roll_call
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.crew import Crew

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
#: Number of models behind servers, and of checkers, that are worked beside those on the GPUs and the CPU.
_LIGHT = 8
#: A worker that has not stopped after this time, in which its database, broker and GPUs should have responded,
#: kills itself; its jobs wait until their leases expire.
_END_SECONDS = 100.0


def serve(database: Database, settings: Settings, broker_url: str, reach: Reach, name: str) -> None:
    """Work jobs until SIGTERM or Ctrl-C; then save what is finished, give the jobs back and return."""
    crew = Crew(database, settings, reach, light=_LIGHT)
    app = celery_app.make(broker_url)
    hostname = f"{name}@{socket.gethostname()}"

    @app.task(name=celery_app.TASK, bind=True)  # type: ignore[untyped-decorator]
    def work(task: Any, job_id: int) -> None:
        if not isinstance(job_id, int):
            raise TypeError(f"a job's id is a number, got {type(job_id).__name__}")
        log.debug("woken", extra={"job": job_id})
        _work(crew, task.request.delivery_info.get("routing_key"))

    def end(number: int, frame: FrameType | None) -> None:
        _end_soon(crew)
        state.should_stop = 0

    def be_ready(**_: Any) -> None:
        # Replace Celery's handlers, which would wait for the task and print beside the log.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        owners = [worker.owner for worker in crew.workers]
        log.info("ready", extra={"workers": owners, "host": hostname, "gpus": reach.gpus})

    roll_call.answer_roll(reach)
    signals.worker_ready.connect(be_ready, weak=False)
    signals.setup_logging.connect(_keep_logging, weak=False)
    with crew, _listening(app, database, hostname, reach, crew):
        app.Worker(
            hostname=hostname,
            pool="threads",
            # The workers of light models take no messages, which another process might need.
            concurrency=len(crew.workers) - _LIGHT,
            without_gossip=True,
            without_mingle=True,
            loglevel="INFO",
            optimization="fair",
            quiet=True,
        ).start()


def _work(crew: Crew, queue: str | None = None) -> None:
    try:
        crew.work(queue)
    except Exception:
        _stop_failed(crew)


def _stop_failed(crew: Crew) -> None:
    """Stop all workers after any error and give their jobs back; a supervisor restarts the process."""
    if crew.stopping.is_set():
        log.warning("the database does not answer, and the worker has been asked to stop", exc_info=True)
        return
    log.exception("a worker failed")
    crew.stopping.set()
    state.should_stop = 1


def _end_soon(crew: Crew) -> None:
    if not crew.stopping.is_set():
        last_resort = threading.Timer(_END_SECONDS, _end_now)
        last_resort.daemon = True
        last_resort.start()
    crew.end()


def _end_now() -> None:
    log.error("not stopped in time; held jobs are released when their leases expire", extra={"seconds": _END_SECONDS})
    os._exit(1)  # the engines end when their pipes close


def _keep_logging(**_: Any) -> None:
    """A connected receiver of this signal keeps Celery from configuring logging."""


@contextmanager
def _listening(app: Celery, database: Database, hostname: str, reach: Reach, crew: Crew) -> Iterator[None]:
    """Keep the worker subscribed to the queues it can work, including those of future runs, and work light ones."""
    over = threading.Event()

    def look() -> None:
        heard: set[str] = set()
        awake: set[Future[None]] = set()
        with ThreadPoolExecutor(_LIGHT, "light") as light:
            while not over.wait(_LOOK_SECONDS):
                awake = {each for each in awake if not each.done()}
                try:
                    with database.read() as session:
                        due = [backlog for backlog in workload.backlogs(session) if reach.fits(backlog)]
                    if len(awake) < _LIGHT and any(backlog.is_light for backlog in due):
                        awake.add(light.submit(_work, crew))
                    heard = _subscribe(app, hostname, heard, {backlog.queue for backlog in due})
                except (DBAPIError, *celery_app.BROKER_ERRORS) as error:
                    log.warning("broker or database unavailable", extra={"error": shorten(str(error))})

    thread = threading.Thread(target=look, daemon=True, name="queues")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _subscribe(app: Celery, hostname: str, heard: set[str], wanted: set[str]) -> set[str]:
    now_heard = set(heard)
    for name in wanted - heard:
        # Remote control is handled in the consumer's own thread; no reply means that it is not up yet.
        if app.control.add_consumer(name, destination=[hostname], reply=True, timeout=2):
            now_heard.add(name)
    for name in heard - wanted:
        if app.control.cancel_consumer(name, destination=[hostname], reply=True, timeout=2):
            now_heard.discard(name)
    return now_heard
