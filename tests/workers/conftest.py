"""Fixtures with a cluster on its own PostgreSQL store."""

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
    """The lease time of the cluster's workers; None is the default. Modules may override this."""
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
