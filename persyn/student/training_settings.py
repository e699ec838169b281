"""The hyper-parameters of a training and its record; imports no model library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

_AtLeastOne = Annotated[int, Meta(ge=1)]

TrainingCallback: TypeAlias = Callable[[int, int, float | None], None]
"""Called with the steps done, the total steps, and the latest loss in nats per token."""


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The hyper-parameters of a training; all of them are part of its identity."""

    #: All weights, or low-rank adapters that are merged at the end.
    tune: Literal["full", "lora"] = "full"
    #: Passes over the dataset.
    epochs: _AtLeastOne = 3
    #: None means 1e-5 for full and 2e-4 for lora.
    learning_rate: Annotated[float, Meta(gt=0)] | None = None
    #: Conversations per step, and how many of them are in memory at a time; None means all of them.
    batch_size: _AtLeastOne = 16
    micro_batch: _AtLeastOne | None = None
    #: Longer conversations are left out; None means the student's maximum.
    max_tokens: _AtLeastOne | None = None
    lora_rank: _AtLeastOne = 16
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")


class Notes(Struct, frozen=True):
    """The record of a finished training."""

    n_rows: int
    #: Rows that were too long.
    n_left_out: int
    #: Response tokens, on which the loss is computed, per epoch.
    response_tokens: int
    steps: int
    #: Of the process that finished it, without the time of interrupted ones.
    seconds: float
    #: [step, mean loss in nats per token since the previous point].
    losses: list[tuple[int, float]]
