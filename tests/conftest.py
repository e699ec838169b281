"""Shared fixtures: small real models and real databases."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from persyn.db.connect import Database
from persyn.llm import gpus
from tests import forked
from tests.cluster import Broker
from tests.postgres import Postgres

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# No test may contact a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Pipes have no width, whatever pytest's processes set for their own output.
os.environ.pop("COLUMNS", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes keep all cores busy, so more threads would only compete.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Marks of tests that load a real model, which should compute alone, and fixtures that are one. The model `tiny` is
#: small enough to compute beside other tests.
_HEAVY = ("model", "vllm")
_MODELS = {"smollm2", "gemma"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, run all tests with real models in one, and those that share a module's fixture in one."""
    has_gpu = bool(gpus.ids())
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Ids travel between the processes with each report, and some parameters have megabytes."""
    return repr(val[:40]) if isinstance(val, (str, bytes)) and len(val) > 1000 else None


def _group(item: pytest.Item) -> str:
    """The group of tests that one process runs; empty for a test that any process may run."""
    fixtures = set(getattr(item, "fixturenames", ()))
    has_model = bool(fixtures & _MODELS) and "tiny" not in fixtures
    if has_model or any(item.get_closest_marker(name) for name in _HEAVY):
        return "models"
    known = getattr(item, "_fixtureinfo", None)  # a test of a page has none
    shared = known and any(each.scope == "module" for found in known.name2fixturedefs.values() for each in found)
    return item.path.stem if shared else ""


@contextmanager
def _alone() -> Iterator[None]:
    """Serialise the creation of a model's folder across processes."""
    Path("build").mkdir(exist_ok=True)
    with FileLock("build/models.lock"):
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which has a chat template."""
    from demo import models

    with _alone():
        return models.smollm2().absolute()


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M: a base model without a template, which produces noise without BOS."""
    from demo import models

    with _alone():
        return models.gemma().absolute()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server with a fully migrated database `migrated`."""
    with Postgres.running() as server:
        migrated = Database(server.create("migrated"))
        migrated.upgrade()
        migrated.close()
        yield server


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully migrated SQLite file, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "persyn.db"
    store = Database(f"sqlite:///{path}")
    store.upgrade()
    store.close()
    return path


@pytest.fixture(scope="session")
def commands_folder() -> Iterator[Path]:
    """A folder for the PATH of shells, with the command `persyn`."""
    with forked.running() as folder:
        yield folder


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A real, empty broker."""
    broker = Broker()
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty, fully migrated store, on each kind of database."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated"), tmp_path / "persyn.db")
        yield f"sqlite:///{tmp_path / 'persyn.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    yield server.create(name, template="migrated")
    server.drop(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The opened store."""
    store = Database(database_url)
    yield store
    store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, closed after its module because its thread has an event loop while it runs."""
    from tests import chromium

    if chromium.find() is None:
        if os.environ.get("CI"):
            pytest.fail(chromium.MISSING)
        pytest.skip(chromium.MISSING)
    with chromium.running() as found:
        yield found


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    from tests import tiny_models

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), tokenizer, tie_word_embeddings=True)
