"""A backbone small enough to tune in a test, and how an engine is worked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persyn.llm.protocols import Engine, Request, Result


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and SmolLM2's tokenizer."""
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


@pytest.fixture
def work() -> Callable[[Engine, Sequence[Request]], list[Result]]:
    """Have an engine answer requests; their results in the order of the requests."""

    def answer(engine: Engine, requests: Sequence[Request]) -> list[Result]:
        engine.submit(requests)
        results: dict[int, Result] = {}
        while engine.pending:
            results |= {result.id: result for result in engine.step()}
        return [results[request.id] for request in requests]

    return answer
