"""Rows of tokens in right-padded batches of like length, for models that judge text that already exists.

Knows what a row costs, not what it is computed for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from persyn.errors import shorten
from persyn.llm.protocols import Failed, Judge, Judged, Request, Result, Tick


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation as a model reads it."""

    #: The request's.
    id: int
    ids: list[int]
    #: Where the response begins in `ids`.
    start: int = 0


Encode: TypeAlias = Callable[[Sequence[Judge]], Sequence[Row | Failed]]
Forward: TypeAlias = Callable[[Sequence[Row]], Sequence[Judged]]


def refused(request: Judge, error: TemplateError) -> Failed:
    """What stands for the row of a conversation that the chat template refuses."""
    return Failed(request.id, f"bad_request: the chat template refuses it: {shorten(str(error))}")


def right_pad(rows: Sequence[Row], pad_id: int, device: torch.device) -> Tensor:
    """(B, L) token ids, each row followed by padding up to the longest."""
    return pad_sequence(
        [torch.tensor(row.ids, dtype=torch.long) for row in rows], batch_first=True, padding_value=pad_id
    ).to(device)


class Padded:
    """Computes `Judge` requests with a model that takes padded batches.

    encode:       makes the requests' rows; see `refused`.
    forward:      judges the rows of one batch, which fit the model; one result per row.
    max_tokens:   how long a row may be; None when the model sets no bound.
    batch_tokens: rows times longest row of a batch. Halved, for good, when a batch does not fit the memory.
    """

    def __init__(
        self, encode: Encode, forward: Forward, *, max_tokens: int | None, batch_tokens: int, tick: Tick
    ) -> None:
        self.batch_tokens = batch_tokens
        self._encode = encode
        self._forward = forward
        self._max_tokens = max_tokens
        self._tick = tick

    def compute(self, requests: Iterable[Request]) -> Iterator[list[Result]]:
        """Yield what cannot be judged, then each batch's results, the longest rows first."""
        asked = []
        for request in requests:
            assert isinstance(request, Judge)
            asked.append(request)
        encoded = [self._fitting(row) for row in self._encode(asked)]
        failures: list[Result] = [row for row in encoded if isinstance(row, Failed)]
        if failures:
            yield failures
        rows = sorted((row for row in encoded if isinstance(row, Row)), key=lambda row: len(row.ids), reverse=True)
        while rows:
            # Whether the memory suffices shows in the first batch, which holds the longest rows.
            batch = rows[: max(1, self.batch_tokens // len(rows[0].ids))]
            results = self._attempt(batch)
            if results is not None:
                rows = rows[len(batch) :]
                yield results

    def _fitting(self, row: Row | Failed) -> Row | Failed:
        if isinstance(row, Row) and self._max_tokens is not None and len(row.ids) > self._max_tokens:
            return Failed(row.id, f"too_long: {len(row.ids):,} tokens, the model takes {self._max_tokens:,}")
        return row

    def _attempt(self, batch: Sequence[Row]) -> list[Result] | None:
        """The batch's results, or None when a smaller one has to be tried."""
        self._tick()
        try:
            return list(self._forward(batch))
        except torch.OutOfMemoryError:
            pass
        # Only here, past the except block, has the traceback let go of the batch's tensors.
        torch.cuda.empty_cache()
        longest = len(batch[0].ids)
        if len(batch) == 1:
            return [Failed(batch[0].id, f"out_of_memory: {longest:,} tokens do not fit by themselves")]
        self.batch_tokens = len(batch) * longest // 2
        return None
