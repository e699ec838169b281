"""Fixtures that request pages of the console without a socket."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient

from persyn.db.connect import Database
from persyn.web import app
from persyn.web.count_cache import CountCache
from persyn.web.safety import Access
from tests.postgres import Postgres
from tests.web.stores import MadeStore, fill


@dataclass(frozen=True, slots=True)
class Filled:
    """A filled store, its content, and its console."""

    database: Database
    made: MadeStore
    console: TestClient

    def get(self, path: str) -> str:
        """The HTML of a page."""
        return self.console.get(path).text


def client(database: Database, **access: Any) -> TestClient:
    """A test client of a console that waits for counts; `access` are the fields of `Access`."""
    console = app.make(database, Access(**access), CountCache(database, patience=30))
    return TestClient(console, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A store without rows, for tests that do not depend on its content."""
    store = Database(f"sqlite:///{tmp_path_factory.mktemp('console')}/persyn.db")
    store.upgrade()
    yield store
    store.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """A filled, read-only store on each kind of database, shared by a module's tests."""
    if request.param == "sqlite":
        store = Database(f"sqlite:///{tmp_path_factory.mktemp('filled')}/persyn.db")
        store.upgrade()
    else:
        server: Postgres = request.getfixturevalue("postgres")
        store = Database(server.create(f"t{uuid.uuid4().hex}", template="migrated"))
    yield Filled(store, fill(store), client(store))
    store.close()
