"""Report on standard error whatever takes longer than a few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

#: How long a command may be silent before the first message, and the interval between further messages.
FIRST_SECONDS = 3.0
NEXT_SECONDS = 10.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Print a message if the body takes longer than a few seconds, and repeat it periodically.

    what: the activity, such as "asking the model hub".
    """
    over, began = threading.Event(), time.monotonic()

    def say() -> None:
        pause = FIRST_SECONDS
        while not over.wait(pause):
            click.echo(f"{what}, {time.monotonic() - began:.0f} s so far ...", err=True)
            pause = NEXT_SECONDS

    teller = threading.Thread(target=say, name="waiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
