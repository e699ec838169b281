"""The console as a process that listens."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.web import app
from persyn.web.kept import Kept
from persyn.web.safety import Access

#: Python's own 5 ms are too long: a page gives the interpreter away at every row that it reads, and while something is
#: counted in another thread it would wait so long for each.
_SWITCH_SECONDS = 0.0005


def serve(database: Database, access: Access, *, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Answer until Ctrl-C or SIGTERM.

    port:  0 takes a free one.
    ready: called with the port when requests are taken.
    Raises `UsageError` when nobody can listen there.
    """
    with listen(host, port) as listener, serving(database, access) as server:
        ready(listener.getsockname()[1])
        server.run(sockets=[listener])


@contextmanager
def serving(database: Database, access: Access) -> Iterator[uvicorn.Server]:
    """The console, ready to run on a socket."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    kept = Kept(database)
    try:
        yield uvicorn.Server(
            uvicorn.Config(
                app.make(database, access, kept),
                log_level="warning",
                access_log=False,  # addresses carry what was searched for
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
            )
        )
    finally:
        kept.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; `UsageError` when that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose others with --host and --port"
        ) from error
