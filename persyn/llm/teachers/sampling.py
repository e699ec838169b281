"""Sample and stop each row of a batch independently.

For `generate` of transformers, which takes the highest score and has one length limit per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from persyn.llm.chat import Chat
from persyn.llm.protocols import Tick
from persyn.llm.reasoning import MarkerReader, cut
from persyn.llm.teachers.generation import EncodedPrompt, repeats

_SEED_BITS = 2**63 - 1
#: Tokens of whitespace that a model may write before its opening marker.
_LEAD_TOKENS = 2


def processors(batch: Sequence[EncodedPrompt], device: torch.device) -> LogitsProcessorList:
    """Processors that turn logits into scores whose arg-max is the sample; `ValueError` for invalid sampling."""
    sampling = batch[0].request.sampling
    chain: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        chain.append(_RepetitionPenalty(sampling.repetition_penalty, batch))
    if sampling.presence_penalty or sampling.frequency_penalty:
        chain.append(OccurrencePenalty(sampling.presence_penalty, sampling.frequency_penalty, _width(batch)))
    if sampling.temperature != 0.0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        # In vLLM's order: what `top_p` keeps depends on it.
        if sampling.min_p:
            chain.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p != 1.0:
            chain.append(TopPLogitsWarper(sampling.top_p))
        chain.append(SeededGumbelNoise([prompt.request.seed for prompt in batch], device))
    return LogitsProcessorList(chain)


class SeededGumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to each row, so that the arg-max is a sample from the row's distribution.

    A row's noise depends only on its seed and the position in the response, not on the rest of the batch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed & _SEED_BITS) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores with noise; excluded tokens stay excluded."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            # On a CPU, uniform noise and two logarithms are several times as fast as `exponential_`.
            row.uniform_(generator=generator)
        return scores - noise.log_().neg_().log_()


class _RepetitionPenalty(LogitsProcessor):
    """Penalises the tokens of a row's prompt and response, but not of its padding."""

    def __init__(self, penalty: float, batch: Sequence[EncodedPrompt]) -> None:
        self._penalise = RepetitionPenaltyLogitsProcessor(penalty)
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores after the penalty."""
        seen = input_ids.clone()
        width = _width(self._batch)
        for row, prompt in zip(seen, self._batch, strict=True):
            row[: width - len(prompt.ids)] = prompt.ids[0]
        penalised: Tensor = self._penalise(seen, scores)
        return penalised


class ReasoningLimit(LogitsProcessor):
    """Writes the closing marker once a row's reasoning has `max_reasoning_tokens` tokens."""

    def __init__(self, batch: Sequence[EncodedPrompt], splits: MarkerReader, chat: Chat) -> None:
        self._width = max(len(prompt.ids) for prompt in batch)
        self._rows = [_Limit.of(prompt, splits, chat) for prompt in batch]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores; where a token is forced, all others are excluded."""
        for row, limit, ids in zip(scores, self._rows, input_ids[:, self._width :], strict=True):
            if limit is not None and (forced := limit.next_token(ids)) is not None:
                row.fill_(-torch.inf)
                row[forced] = 0.0
        return scores


@dataclass(slots=True)
class _Limit:
    """How much of its reasoning one row has left."""

    n_tokens: int
    opens: list[int]
    closes: list[int]
    #: Where the reasoning begins in the response; None before its opening marker.
    start: int | None
    #: How many tokens of the closing marker are forced already.
    n_forced: int = 0
    is_over: bool = False

    @classmethod
    def of(cls, prompt: EncodedPrompt, splits: MarkerReader, chat: Chat) -> _Limit | None:
        n_tokens, opened = prompt.request.sampling.max_reasoning_tokens, splits.opened(prompt.tail)
        markers = opened or splits.markers
        if n_tokens is None or markers is None:
            return None
        return cls(n_tokens, chat.encode(markers.opens), chat.encode(markers.closes), 0 if opened else None)

    def next_token(self, ids: Tensor) -> int | None:
        """The token that must follow a response so far; None if it is the model's choice."""
        length = len(ids)
        if self.start is None and length <= len(self.opens) + _LEAD_TOKENS and _ends_with(ids, self.opens):
            self.start = length
        if self.is_over or self.start is None:
            return None
        if self.n_forced == 0 and _ends_with(ids[self.start :], self.closes):
            self.is_over = True
            return None
        if self.n_forced == 0 and length - self.start < self.n_tokens:
            return None
        token = self.closes[self.n_forced]
        self.n_forced += 1
        self.is_over = self.n_forced == len(self.closes)
        return token


def _ends_with(ids: Tensor, end: list[int]) -> bool:
    return ids[-len(end) :].tolist() == end


class OccurrencePenalty(LogitsProcessor):
    """Subtracts from the logits of the tokens that occur in a row's response.

    presence:  subtracted once.
    frequency: subtracted as often as a token occurs.
    width:     tokens of the padded prompts.
    """

    def __init__(self, presence: float, frequency: float, width: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores after the penalties."""
        written = input_ids[:, self._width :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class RowStoppingCriteria(StoppingCriteria):
    """Ends each row at its end token, its stop text, its `max_tokens` or a repetition, and records when."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        stops: Sequence[str],
        batch: Sequence[EncodedPrompt],
        tick: Tick,
    ) -> None:
        #: Tokens of each row's response, including the one that ended it; 0 while it is unfinished.
        self.lengths = [0] * len(batch)
        self.seconds = [0.0] * len(batch)
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stops = stops
        # A token is at least one byte; the first and last may include bytes of the surrounding text.
        self._tail = max((len(stop.encode()) + 2 for stop in stops), default=0)
        self._repetition = batch[0].request.sampling.repetition_detection
        repeated = self._repetition.max_pattern_size * self._repetition.min_count if self._repetition else 0
        #: Tokens of a response that are read after each step.
        self._read = max(self._tail, repeated, 1)
        self._limits = [prompt.max_tokens for prompt in batch]
        self._width = _width(batch)
        self._tick = tick
        self._began = perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) whether each row has ended."""
        self._tick()
        length = input_ids.shape[1] - self._width
        for i, ids in enumerate(input_ids[:, self._width :][:, -self._read :].tolist()):
            if not self.lengths[i] and (length >= self._limits[i] or self._is_end(ids)):
                self.lengths[i] = length
                self.seconds[i] = perf_counter() - self._began
        return torch.tensor([n > 0 for n in self.lengths], device=input_ids.device)

    def _is_end(self, ids: list[int]) -> bool:
        """Whether the last tokens of a response end it."""
        if ids[-1] in self._end_ids:
            return True
        if self._stops and cut(str(self._tokenizer.decode(ids[-self._tail :])), self._stops)[1]:
            return True
        return self._repetition is not None and repeats(ids, self._repetition)


def _width(batch: Sequence[EncodedPrompt]) -> int:
    """Tokens of a batch's padded prompts."""
    return max(len(prompt.ids) for prompt in batch)
