"""`persyn metrics`: export metrics for Prometheus."""

from __future__ import annotations

import signal
import threading
from typing import Any

import click

from persyn.cli.context import store


@click.command()
@click.option("--port", default=9464, show_default=True, type=click.IntRange(0, 65535), help="0 chooses a free port.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; there is no authentication."
)
def metrics(port: int, host: str) -> None:
    """Serve the store's metrics for Prometheus at /metrics until Ctrl-C or SIGTERM.

    One process per store is enough; all metrics are read from the database.
    """
    from persyn.workers.cluster import metrics as exporter

    over = threading.Event()

    def stop(*_: Any) -> None:
        over.set()

    with store() as database, exporter.serving(database, host=host, port=port) as found:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        click.echo(f"metrics at http://{host}:{found}/metrics")
        over.wait()
