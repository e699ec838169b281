"""What tests of workers share: a cluster over a PostgreSQL store of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from persyn.db.connect import Database
from tests.cluster import Broker, Cluster
from tests.postgres import Postgres


@pytest.fixture
def lease_seconds() -> int | None:
    """How long a worker of the cluster holds a job without a sign; None is the default. A module may say otherwise."""
    return None


@pytest.fixture
def cluster(tmp_path: Path, postgres: Postgres, broker: Broker, lease_seconds: int | None) -> Iterator[Cluster]:
    url = postgres.create(f"t{uuid.uuid4().hex}", template="migrated")
    lease = {"PERSYN_LEASE_SECONDS": str(lease_seconds)} if lease_seconds else {}
    cluster = Cluster(tmp_path, url, broker, **lease)
    yield cluster
    cluster.stop()


@pytest.fixture
def store(cluster: Cluster) -> Iterator[Database]:
    """The cluster's store."""
    database = Database(cluster.database_url)
    yield database
    database.close()
