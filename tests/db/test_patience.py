"""A frozen connection is given up within seconds; a slow statement is waited for."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError

from persyn.db.catalog import Run
from persyn.db.connect import Database
from tests.factories import make_run
from tests.postgres import Postgres
from tests.proxy import Proxy

#: Seconds of silence before the stores of these tests check that the server is working.
SILENCE = 0.5


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create(f"t{uuid.uuid4().hex}", template="migrated")


@pytest.fixture
def frozen(postgres: Postgres, url: str) -> Iterator[tuple[Database, Proxy]]:
    """A store behind a proxy, with a working connection."""
    through, proxy = postgres.behind(url)
    store = Database(through, idle_seconds=1, silence_seconds=SILENCE)
    with store.read() as session:
        assert session.scalar(text("SELECT 1")) == 1
    yield store, proxy
    proxy.close()
    store.close()


def names(store: Database) -> list[str]:
    with store.read() as session:
        return list(session.scalars(select(Run.name)))


def test_a_connection_that_is_stranded_is_replaced_by_one_that_works(frozen: tuple[Database, Proxy]) -> None:
    store, proxy = frozen
    proxy.strand()
    began = time.monotonic()

    assert names(store) == []  # detected when the connection was checked, before its use
    assert time.monotonic() - began < 5


def test_where_nothing_gets_through_it_is_said_within_seconds(frozen: tuple[Database, Proxy]) -> None:
    store, proxy = frozen
    began = time.monotonic()
    with store.write() as session:
        make_run(session)
        proxy.freeze()
        with pytest.raises(OperationalError, match="does not answer"):
            session.execute(text("SELECT 1"))
        session.rollback()

    assert time.monotonic() - began < 10
    proxy.thaw()
    assert names(store) == []


def test_a_statement_that_takes_longer_than_the_silence_is_waited_for(frozen: tuple[Database, Proxy]) -> None:
    store, _ = frozen
    with store.write() as session:
        assert session.scalar(text("SELECT 1 FROM pg_sleep(2)")) == 1


def test_whoever_has_to_end_waits_for_nothing_longer_than_it_may(frozen: tuple[Database, Proxy]) -> None:
    store, _ = frozen
    threading.Timer(0.3, store.hurry, [0.5]).start()
    began = time.monotonic()

    with pytest.raises(OperationalError, match="time limit was reached"), store.write() as session:
        session.execute(text("SELECT pg_sleep(30)"))
    assert time.monotonic() - began < 3
    assert store.is_given_up


def test_whoever_is_frozen_in_the_middle_of_writing_holds_up_others_for_seconds_only(
    frozen: tuple[Database, Proxy], url: str
) -> None:
    store, proxy = frozen
    with store.write() as session:
        make_run(session)
    with store.write() as session:
        session.execute(text("UPDATE runs SET name = 'first'"))
        proxy.freeze()
        other = Database(url)
        began = time.monotonic()
        with other.write() as beside:
            beside.execute(text("UPDATE runs SET name = 'second'"))
        assert time.monotonic() - began < 5
        other.close()
        proxy.thaw()
        with pytest.raises(OperationalError):  # after resuming, its transaction is gone
            session.execute(text("UPDATE runs SET seed = 1"))
        session.rollback()

    assert names(store) == ["second"]


def test_reading_may_pause_for_as_long_as_it_likes(frozen: tuple[Database, Proxy]) -> None:
    store, _ = frozen
    with store.read() as session:
        assert session.scalar(text("SELECT 1")) == 1
        time.sleep(1.5)
        assert session.scalar(text("SELECT 2")) == 2


def test_a_database_that_may_only_be_read_is_one_that_is_away(postgres: Postgres, url: str) -> None:
    store = Database(url)
    name = store.url.database
    postgres.administer(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(OperationalError, match="read-only"), store.write() as session:
        make_run(session)

    postgres.administer(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    with store.write() as session:  # on another connection, since the old one would still report it
        make_run(session)
    assert names(store) == ["run"]
    store.close()
