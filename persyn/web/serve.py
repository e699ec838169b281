"""Run the console as a server process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.web import app
from persyn.web.count_cache import CountCache
from persyn.web.safety import Access

#: Python's default of 5 ms is too long: a page releases the interpreter for every row that it reads, and would wait
#: that long each time while another thread is counting.
_SWITCH_SECONDS = 0.0005


def serve(database: Database, access: Access, *, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    port:  0 selects a free one.
    ready: called with the port when requests are accepted.
    Raises `UsageError` when the address cannot be bound.
    """
    with listen(host, port) as listener, serving(database, access) as server:
        ready(listener.getsockname()[1])
        server.run(sockets=[listener])


@contextmanager
def serving(database: Database, access: Access) -> Iterator[uvicorn.Server]:
    """Build a server for the console that can run on a socket."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    cache = CountCache(database)
    try:
        yield uvicorn.Server(
            uvicorn.Config(
                app.make(database, access, cache),
                log_level="warning",
                access_log=False,  # URLs contain search texts
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
            )
        )
    finally:
        cache.close()


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; raise `UsageError` when that fails."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose others with --host and --port"
        ) from error
