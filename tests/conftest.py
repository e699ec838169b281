"""What tests share: real small models, real databases."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
