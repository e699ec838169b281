"""No silence: whatever takes longer than a few seconds says so on standard error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

#: How long a command may be silent before it says what it waits for, and how long between two such lines.
FIRST_SECONDS = 3.0
NEXT_SECONDS = 10.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, should it take longer than a few seconds, and again now and then.

    what: as "asking the model hub".
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
