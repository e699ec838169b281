"""Create tiny random reward models that distinguish rows and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification


def make(folder: Path, tokenizer: Any, *, num_labels: int = 1, pad_token_id: int | None = None, seed: int = 0) -> Path:
    """A tiny Llama with a random head, determined by the seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        num_labels=num_labels,
        pad_token_id=pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
