"""What tests share: real small models, real databases."""

from __future__ import annotations

import os
import shutil
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

    return models.smollm2().absolute()


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M: a base model without a template, noise without BOS."""
    from demo import models

    return models.gemma().absolute()


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


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)
    return folder
