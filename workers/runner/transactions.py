"""A worker's transactions, which outlast a database that is unavailable for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from tenacity import Retrying, retry_if_exception_type, wait_exponential

from persyn.db.connect import Database

T = TypeVar("T")

#: How long to wait for an unavailable database.
_OUTAGE_SECONDS = 900


class Transactions:
    """Runs transactions, again while the database is unavailable; each attempt commits entirely or not at all.

    Raises `sqlalchemy.exc.OperationalError` when it has been unavailable for too long.

    alive: called before each attempt. pause: waits that many seconds before the next one.
    """

    def __init__(self, database: Database, *, alive: Callable[[], None], pause: Callable[[float], None]) -> None:
        self._database = database
        self._alive = alive
        self._pause = pause

    def read(self, act: Callable[[Session], T]) -> T:
        """What an action finds in a transaction that writes nothing."""

        def attempt() -> T:
            with self._database.read() as session:
                return act(session)

        return self.outlast(attempt)

    def write(self, act: Callable[[Session], T]) -> T:
        """What an action returns, once its changes are committed."""

        def attempt() -> T:
            with self._database.write() as session:
                return act(session)

        return self.outlast(attempt)

    def outlast(self, attempt: Callable[[], T]) -> T:
        """Call a function that uses the database until it does not fail for the database's unavailability."""
        retrying = Retrying(
            retry=retry_if_exception_type(OperationalError),
            wait=wait_exponential(multiplier=0.2, max=15),
            stop=lambda tried: self._database.is_given_up or (tried.seconds_since_start or 0) >= _OUTAGE_SECONDS,
            sleep=self._pause,
            before=lambda attempt: self._alive(),
            reraise=True,
        )
        return retrying(attempt)
