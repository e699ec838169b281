"""Create tiny Llamas with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification


def language_model(folder: Path, tokenizer: Any, **sizes: Any) -> Path:
    """A language model, whose weights are the same each time."""
    return _make(folder, tokenizer, LlamaForCausalLM, 0, sizes)


def served_model(folder: Path, tokenizer: Any) -> Path:
    """A language model of a form that vLLM supports on a CPU."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "initializer_range": 0.3}
    return language_model(folder, tokenizer, **sizes, max_position_embeddings=256)


def embedding_model(folder: Path, model: Path) -> Path:
    """A sentence-embedding model in the layout of sentence-transformers, of an existing language model."""
    shutil.copytree(model, folder)
    (folder / "1_Pooling").mkdir()
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def reward_model(
    folder: Path, tokenizer: Any, *, num_labels: int = 1, pad_token_id: int | None = None, seed: int = 0
) -> Path:
    """A reward model that distinguishes rows and positions, determined by the seed."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    head = {"initializer_range": 0.5, "num_labels": num_labels, "pad_token_id": pad_token_id}
    return _make(folder, tokenizer, LlamaForSequenceClassification, seed, sizes | head)


def _make(folder: Path, tokenizer: Any, kind: Any, seed: int, sizes: dict[str, Any]) -> Path:
    """Write a model with the sizes below, or those given, and its tokenizer."""
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **{**usual, "max_position_embeddings": 128, **sizes})
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
