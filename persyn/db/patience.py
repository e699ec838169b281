"""How long PostgreSQL is waited for: a connection that is frozen on its way is given up, a long statement is not.

Whatever stands between may take what is sent, answer TCP's questions and pass nothing on; neither side's kernel sees
that. So whoever has waited a while asks over another connection whether the server is still at work on it.
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

#: How long a connection is made, at most, and how long one is made to ask after another.
_CONNECT_SECONDS, _ASK_SECONDS = 10, 5
#: A server is at work on a statement unless it waits for the client.
_AT_WORK = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = %s AND state = 'active' AND wait_event_type IS DISTINCT FROM 'Client'
"""
#: A server that is, or has become, one that others may only read: perhaps another connection finds one to write to.
_READ_ONLY = psycopg.errors.ReadOnlySqlTransaction


class Patience:
    """Shared by the connections of one store.

    silence_seconds: after so long without an answer the server is asked whether it is at work.
    """

    def __init__(self, silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self.ends_at = float("inf")

    @property
    def left(self) -> float:
        """Seconds for which anything may still be waited for."""
        return max(0.0, self.ends_at - time.monotonic())


class PatientConnection(psycopg.Connection[Any]):
    """A connection on which no answer is waited for in vain; `psycopg.OperationalError` instead, and it is closed."""

    patience: Patience
    address: dict[str, Any]

    @classmethod
    def reach(cls, patience: Patience, address: dict[str, Any]) -> Self:
        """Connect; each connection has a name of its own, by which the server can be asked for it."""
        name = f"{address.get('application_name', 'persyn')[:50]} {uuid.uuid4().hex[:12]}"
        seconds = max(1, int(min(patience.left, float(address.get("connect_timeout", _CONNECT_SECONDS)))))
        connection = cls.connect(**{**address, "application_name": name, "connect_timeout": seconds})
        connection.patience, connection.address = patience, {**address, "application_name": name}
        return connection

    def wait(self, gen: PQGen[Any], *arguments: Any, **more: Any) -> Any:
        """As psycopg's, which calls this for all that goes over the connection."""
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
        """When the server was last known to be at work on this; raises when it is not."""
        if not self.patience.left:
            self._give_up("there is no more time to wait for it")
        silent = time.monotonic() - heard_at
        if silent < self.patience.silence_seconds:
            return heard_at
        if not self._is_at_work():
            self._give_up(f"the connection has been silent for {silent:.0f} s, and the server is not at work on it")
        return time.monotonic()

    def _is_at_work(self) -> bool:
        seconds = max(1, int(min(self.patience.left, _ASK_SECONDS)))
        address = {**self.address, "application_name": "persyn asks", "connect_timeout": seconds}
        try:
            with PatientConnection.connect(**address, autocommit=True) as other:
                # Its own answer is waited for no longer than that.
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
    """Have an engine make such connections, and tell every way in which a database is away as `OperationalError`."""

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
