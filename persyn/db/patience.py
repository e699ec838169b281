"""Detect a frozen PostgreSQL connection and give it up, without interrupting a long statement.

A proxy or firewall in between may accept data and answer TCP keepalives while forwarding nothing; neither kernel
notices. After a silence, another connection therefore checks whether the server still works on the statement.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Self

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import OperationalError

#: Timeout of a connection attempt, and of the connection that checks on another one.
_CONNECT_SECONDS, _ASK_SECONDS = 10, 5
#: A server works on a statement unless it waits for the client.
_AT_WORK = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = %s AND state = 'active' AND wait_event_type IS DISTINCT FROM 'Client'
"""
#: The server is, or has become, a read-only replica; a new connection may reach the primary.
_READ_ONLY = psycopg.errors.ReadOnlySqlTransaction


class Patience:
    """Timeouts shared by the connections of one store.

    silence_seconds: after this long without an answer, check whether the server is working.
    """

    def __init__(self, silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self.ends_at = float("inf")

    @property
    def left(self) -> float:
        """Seconds left to wait for anything."""
        return max(0.0, self.ends_at - time.monotonic())


class PatientConnection(psycopg.Connection[Any]):
    """A connection that never waits in vain: it closes itself and raises `psycopg.OperationalError`."""

    patience: Patience
    address: dict[str, Any]

    @classmethod
    def reach(cls, patience: Patience, address: dict[str, Any]) -> Self:
        """Connect under a unique application name, by which the server can be asked about this connection."""
        name = f"{address.get('application_name', 'persyn')[:50]} {uuid.uuid4().hex[:12]}"
        seconds = max(1, int(min(patience.left, float(address.get("connect_timeout", _CONNECT_SECONDS)))))
        connection = cls.connect(**{**address, "application_name": name, "connect_timeout": seconds})
        connection.patience, connection.address = patience, {**address, "application_name": name}
        return connection

    def wait(self, gen: PQGen[Any], *arguments: Any, **more: Any) -> Any:
        """Override psycopg's method, through which every exchange with the server passes."""
        return super().wait(self._watched(gen) if hasattr(self, "patience") else gen, *arguments, **more)

    def _watched(self, gen: PQGen[Any]) -> PQGen[Any]:
        heard_at = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                heard_at = time.monotonic() if ready else self._still_waited_for(heard_at)
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value

    def _still_waited_for(self, heard_at: float) -> float:
        """When the server was last known to be working on the statement; raises if it is not."""
        if not self.patience.left:
            self._give_up("the time limit was reached")
        silent = time.monotonic() - heard_at
        if silent < self.patience.silence_seconds:
            return heard_at
        if not self._is_at_work():
            self._give_up(f"the connection has been silent for {silent:.0f} s, and the server is not busy with it")
        return time.monotonic()

    def _is_at_work(self) -> bool:
        seconds = max(1, int(min(self.patience.left, _ASK_SECONDS)))
        address = {**self.address, "application_name": "persyn asks", "connect_timeout": seconds}
        try:
            with PatientConnection.connect(**address, autocommit=True) as other:
                # The check itself must not wait longer than this.
                other.patience = Patience(float("inf"))
                other.patience.ends_at = time.monotonic() + seconds
                row = other.execute(_AT_WORK, [self.address["application_name"]]).fetchone()
        except psycopg.Error:
            return False
        return bool(row and row[0])

    def _give_up(self, why: str) -> None:
        self.pgconn.finish()
        raise psycopg.OperationalError(f"the database does not answer: {why}")


def install(engine: Engine, patience: Patience) -> None:
    """Make an engine use these connections and report every lost connection as `OperationalError`."""

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, address: dict[str, Any]) -> PatientConnection:
        return PatientConnection.reach(patience, address)

    @event.listens_for(engine, "handle_error")
    def tell(context: ExceptionContext) -> None:
        error = context.original_exception
        if isinstance(error, _READ_ONLY):
            context.is_disconnect = True
        if context.is_disconnect and not isinstance(context.sqlalchemy_exception, OperationalError):
            raise OperationalError(
                context.statement, None, error, hide_parameters=True, connection_invalidated=True
            ) from error
