"""`persyn dispatch`: notify workers of waiting jobs, and requeue the jobs of lost workers."""

from __future__ import annotations

import signal
from typing import Any

import click

from persyn.cli.context import broker, store
from persyn.settings import Settings


@click.command()
def dispatch() -> None:
    """Notify workers of waiting jobs, and requeue the jobs of dead workers.

    May run on several hosts: one leads, and another takes over if it dies. It keeps all state in the database.
    """
    from persyn.workers.cluster import app
    from persyn.workers.cluster.dispatch import Dispatcher
    from persyn.workers.runner import logs

    settings = Settings.from_environment()
    celery = app.make(broker(settings))
    logs.to_json()
    with store(patient=True) as database:
        dispatcher = Dispatcher(database, celery, lease_seconds=settings.lease_seconds)

        def stop(*_: Any) -> None:
            dispatcher.end()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        dispatcher.run()
