"""Simulate a host with several GPUs for the trainer."""

from __future__ import annotations

from transformers import TrainingArguments


class OnFourGpus(TrainingArguments):
    """Training arguments as on a host with four visible GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 4
