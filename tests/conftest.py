"""What tests share: real small models, real databases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from persyn.db.connect import Database
from tests.cluster import Broker
from tests.postgres import Postgres

# No test may ask a model hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: has a chat template."""
    from demo import models

    return models.smollm2()


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M: a base model without a template, noise without BOS."""
    from demo import models

    return models.gemma()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server, its database `migrated` brought to head by the real migrations."""
    with Postgres.running() as server:
        migrated = Database(server.create("migrated"))
        migrated.upgrade()
        migrated.close()
        yield server


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A real broker, empty."""
    broker = Broker()
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store at head, once on each kind of database."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'persyn.db'}"
        store = Database(url)
        store.upgrade()
        store.close()
        yield url
        return
    server: Postgres = request.getfixturevalue("postgres")
    yield server.create(f"t{uuid.uuid4().hex}", template="migrated")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The store, open."""
    store = Database(database_url)
    yield store
    store.close()
