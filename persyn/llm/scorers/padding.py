"""Batch rows of tokens of similar length, right-padded, for models that score existing text.

Independent of what is computed for a row.
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
class TokenRow:
    """One conversation as token ids."""

    #: The request's id.
    id: int
    ids: list[int]
    #: Index in `ids` where the response begins.
    start: int = 0
    #: Index where the answer begins, after the reasoning; None without reasoning.
    answer: int | None = None
    #: The student reads the response once more for these statistics, see `persyn.method.learnability.EXTRA`, and then
    #: begins with these ids: what the chat template writes around the turns.
    extra: Sequence[str] = ()
    frame: Sequence[int] = ()


Encode: TypeAlias = Callable[[Sequence[Judge]], Sequence[TokenRow | Failed]]
Forward: TypeAlias = Callable[[Sequence[TokenRow]], Sequence[Judged]]


def refused(request: Judge, error: TemplateError) -> Failed:
    """The failure of a conversation that the chat template rejects."""
    return Failed(request.id, f"bad_request: the chat template rejects it: {shorten(str(error))}")


def right_pad(rows: Sequence[TokenRow], pad_id: int, device: torch.device) -> Tensor:
    """(B, L) token ids, each row padded to the longest."""
    return pad_sequence(
        [torch.tensor(row.ids, dtype=torch.long) for row in rows], batch_first=True, padding_value=pad_id
    ).to(device)


class Padded:
    """Computes `Judge` requests with a model that takes padded batches.

    encode:       converts requests to rows; see `refused`.
    forward:      scores the rows of one batch, which fit the model; one result per row.
    max_tokens:   maximum length of a row; None when the model sets no bound.
    batch_tokens: rows times longest row of a batch. Halved permanently when a batch does not fit in memory.
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
        """Yield the failures first, then each batch's results, longest rows first."""
        asked = []
        for request in requests:
            assert isinstance(request, Judge)
            asked.append(request)
        encoded = [self._fitting(row) for row in self._encode(asked)]
        failures: list[Result] = [row for row in encoded if isinstance(row, Failed)]
        if failures:
            yield failures
        rows = sorted((row for row in encoded if isinstance(row, TokenRow)), key=lambda row: len(row.ids), reverse=True)
        while rows:
            # The first batch has the longest rows, so insufficient memory shows at once.
            batch = rows[: max(1, self.batch_tokens // len(rows[0].ids))]
            results = self._attempt(batch)
            if results is not None:
                rows = rows[len(batch) :]
                yield results

    def _fitting(self, row: TokenRow | Failed) -> TokenRow | Failed:
        if isinstance(row, TokenRow) and self._max_tokens is not None and len(row.ids) > self._max_tokens:
            return Failed(row.id, f"too_long: {len(row.ids):,} tokens, the model takes {self._max_tokens:,}")
        return row

    def _attempt(self, batch: Sequence[TokenRow]) -> list[Result] | None:
        """The batch's results, or None if a smaller batch must be tried."""
        self._tick()
        try:
            return list(self._forward(batch))
        except torch.OutOfMemoryError:
            pass
        # After the except block, since the traceback keeps the batch's tensors alive.
        torch.cuda.empty_cache()
        longest = len(batch[0].ids)
        if len(batch) == 1:
            return [Failed(batch[0].id, f"out_of_memory: {longest:,} tokens do not fit even in a batch of one")]
        self.batch_tokens = len(batch) * longest // 2
        return None
