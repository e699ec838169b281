"""A host of several GPUs, as far as a trainer sees it."""

from __future__ import annotations

from transformers import TrainingArguments


class OnFourGpus(TrainingArguments):
    """What a trainer finds on a host that hides none of its GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 4
