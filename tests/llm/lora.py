"""LoRA adapters with random weights, made by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def make(base: Path, folder: Path, *, seed: int = 0, rank: int = 8) -> Path:
    """Write an adapter of a base model that changes what it writes."""
    import peft

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder
