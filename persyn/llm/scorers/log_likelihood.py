"""Score learnability: the log-likelihood of a response under the student, a sum in nats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, TypeAlias

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from persyn.llm import fidelity, options, scoring, template_check
from persyn.llm.batch_rule import BatchRule
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, EncodedResponse, load_tokenizer
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Tick
from persyn.llm.scorers.padding import Padded, TokenRow, refused, right_pad
from persyn.llm.template import Conversation
from persyn.method import learnability

#: Positions passed through the LM head at once: 0.3 GB in float32 with a vocabulary of 152,000.
_HEAD_ROWS = 512
#: Minimum number of logits at once on a GPU, i.e. more positions for a small vocabulary: 0.3 GB in float32.
_HEAD_LOGITS = 2**26
#: Logits converted to float32 at once on a CPU, and on a GPU.
_CACHED, _CONVERTED = 1_000_000, 2**24

Tokens: TypeAlias = NDArray[np.float64]
"""(L, 3) log-probability, rank and entropy of each token."""


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a student that answers `Judge` with the log-likelihood of the response.

    The value is the sum over the answer's tokens, its end token included, given the conversation and
    the reasoning in the student's own chat format; `n_tokens` is their number. The reasoning's sum and
    number, with its closing marker, are separate, and so are the other statistics of both. A response that exceeds
    the model's context together with its conversation fails as `too_long`; it is truncated only if an option says so.
    """
    chosen = options.decode(spec, options.LogLikelihoodOptions)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos, variables=chosen.chat_template_kwargs)
    template_check.require(spec, chat)
    model = scoring.load_weights(AutoModelForCausalLM, spec, chosen)
    extra = [name for name in learnability.EXTRA if name in chosen.statistics]

    def row(request: Judge, found: EncodedResponse | TemplateError) -> TokenRow | Failed:
        if isinstance(found, TemplateError):
            return refused(request, found)
        end = None if chosen.response_tokens is None else found.start + chosen.response_tokens
        frame = chat.frame_ids(_conversation(request)) if extra else []
        return TokenRow(request.id, found.ids[:end], found.start, found.answer, extra, frame)

    def encode(requests: Sequence[Judge]) -> list[TokenRow | Failed]:
        found = chat.all_response_ids([_conversation(each) for each in requests])
        return [row(*pair) for pair in zip(requests, found, strict=True)]

    padded = Padded(
        encode,
        StudentScorer(model, tick).judge,
        max_tokens=scoring.max_tokens(model.config),
        batch_tokens=scoring.batch_tokens(spec, chosen),
        tick=tick,
    )
    return Batched(padded.compute, version=scoring.VERSION, chunk=scoring.CHUNK)


def _conversation(request: Judge) -> Conversation:
    return Conversation(request.messages, request.response, request.reasoning, request.tool_calls, request.tools)


class StudentScorer:
    """A causal language model, split into decoder and head so that the head only sees scored positions.

    If the head applied to the decoder's hidden states does not give the model's logits, all logits are computed.
    """

    def __init__(self, model: PreTrainedModel, tick: Tick = lambda: None) -> None:
        self._model: Any = model
        self._tick = tick
        self._parts: tuple[nn.Module, nn.Module] | None = _split(model)
        self._mates = BatchRule(model)
        self._device = model.device
        self._detail = scoring.describe(model)
        vocabulary = self._check()
        self._head_rows = _HEAD_ROWS if self._device.type == "cpu" else max(_HEAD_ROWS, _HEAD_LOGITS // vocabulary)

    def judge(self, rows: Sequence[TokenRow]) -> list[Judged]:
        """The log-likelihood of each row's ids from `start` on, those before `answer` apart, and other statistics."""
        extra = self._extra(rows)
        return [self._judged(*each) for each in zip(rows, self._tokens(rows), extra, strict=True)]

    def _judged(self, row: TokenRow, tokens: Tokens, extra: dict[str, dict[str, float]]) -> Judged:
        parts = _parts(row, tokens)
        sums = {part: float(of_part[:, 0].sum()) for part, of_part in parts.items()}
        reasoning = parts.get("reasoning")
        return Judged(
            row.id,
            sums["answer"],
            len(parts["answer"]),
            reasoning_value=sums.get("reasoning"),
            reasoning_n_tokens=None if reasoning is None else len(reasoning),
            statistics={part: learnability.summarise(of_part) | extra[part] for part, of_part in parts.items()},
            detail=self._detail,
        )

    def _extra(self, rows: Sequence[TokenRow]) -> list[dict[str, dict[str, float]]]:
        """For each row, the statistics of each part for which the response is read once more."""
        pieces = [(n, name, piece) for n, row in enumerate(rows) for name in row.extra for piece in _pieces(row, name)]
        pieces.sort(key=lambda each: len(each[2].ids), reverse=True)
        found: list[dict[str, dict[str, float]]] = [{"answer": {}, "reasoning": {}} for _ in rows]
        size = len(rows) * max(len(row.ids) for row in rows)  # as much as the rows themselves
        while pieces:
            batch = pieces[: max(1, size // len(pieces[0][2].ids))]
            pieces = pieces[len(batch) :]
            self._tick()
            for (n, name, piece), tokens in zip(batch, self._tokens([piece for _, _, piece in batch]), strict=True):
                for part, of_part in _parts(piece, tokens).items():
                    found[n][part][name] = found[n][part].get(name, 0.0) + float(of_part[:, 0].sum())
        return found

    def _tokens(self, rows: Sequence[TokenRow]) -> list[Tokens]:
        """The tokens of each row's ids from `start` on."""
        return self._mates.compute(rows, [len(row.ids) for row in rows], self._measured)

    @torch.inference_mode()
    def _measured(self, rows: Sequence[TokenRow]) -> list[Tokens]:
        # All padding is to the right of the scored tokens. A causal model does not attend to it, so any id will
        # do, and attention without a mask can use its fastest kernel.
        ids = right_pad(rows, rows[0].ids[0], self._device)  # (B, L)
        width = ids.shape[1]
        places = torch.tensor(
            [i * width + j for i, row in enumerate(rows) for j in range(row.start - 1, len(row.ids) - 1)]
        ).to(self._device)
        targets = torch.tensor([token for row in rows for token in row.ids[row.start :]]).to(self._device)
        # Copies to a GPU block, so all inputs are copied before the computation starts.
        hidden = self._states(ids)  # (B, L, H)
        chosen = hidden.flatten(0, 1)[places.to(hidden.device)]  # (N, H)
        measured = self._measure(chosen, targets.to(hidden.device)).numpy()  # (N, 3)
        return np.split(measured, np.cumsum([len(row.ids) - row.start for row in rows])[:-1])

    def _measure(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N, 3) float64 log-probability, rank and entropy of each target after its (N, H) hidden state, on the CPU."""
        parts = []
        n = self._head_rows
        for states, tokens in zip(torch.split(hidden, n), torch.split(targets, n), strict=True):
            logits = self._logits(states)  # (n, V)
            # On a CPU, pieces that fit its cache are faster and avoid page faults of a large tensor.
            rows = max(1, (_CACHED if logits.device.type == "cpu" else _CONVERTED) // logits.shape[1])
            for some, chosen in zip(torch.split(logits, rows), torch.split(tokens, rows), strict=True):
                parts.append(_measures(some.float(), chosen.to(logits.device)).double())
        return torch.cat(parts).cpu()

    def _states(self, ids: Tensor) -> Tensor:
        """The input of `_logits` at (B, L) positions: hidden states, or the logits themselves."""
        if self._parts is None:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
            return logits
        states: Tensor = self._parts[0](input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _logits(self, states: Tensor) -> Tensor:
        if self._parts is None:
            return states
        logits: Tensor = self._parts[1](inputs_embeds=states[None], use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def _check(self) -> int:
        """Check that decoder and head together equal the model, or stop using them. Returns the vocabulary size."""
        ids = torch.arange(1, 9, device=self._device)[None]
        whole: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        try:
            parts = self._logits(self._states(ids)[0]).to(whole.device)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            # Some heads need more from the decoder than hidden states, which differs between model families.
            parts = None
        if parts is None or not fidelity.is_alike(whole, parts):
            self._parts = None
        return int(whole.shape[-1])


def _measures(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, 3) log-probability and rank of each target and entropy under (n, V) logits, which are overwritten.

    With x the logits minus their highest, Z = sum(exp(x)) and t the target: x_t - log Z, the number of logits above the
    target's plus 1, and log Z - sum(exp(x) x) / Z.
    """
    target = logits.gather(1, targets[:, None])
    rank = _n_above(logits, target) + 1
    highest = logits.amax(1, keepdim=True)
    logits.sub_(highest)
    weights = logits.exp()
    total, weighted = weights.sum(1), _weighted(weights, logits)
    log_total = total.log()
    return torch.stack([(target - highest).squeeze(1) - log_total, rank, log_total - weighted / total], 1)


def _weighted(weights: Tensor, logits: Tensor) -> Tensor:
    """(n,) sums of exp(x) x, given (n, V) exp(x) and x; 0 for x = -inf, a token that the model excludes."""
    if logits.device.type == "cpu":
        found: Tensor = torch.linalg.vecdot(weights, logits)
        if not found.isnan().any():
            return found
    # A GPU would have to wait for that question.
    negated: Tensor = torch.special.entr(weights).sum(1)
    return -negated


def _n_above(logits: Tensor, target: Tensor) -> Tensor:
    """(n,) number of (n, V) logits above the (n, 1) target's."""
    if logits.device.type != "cpu":
        return (logits > target).sum(1)
    # NumPy compares and counts five times as fast.
    pairs = zip(logits.numpy(), target.numpy(), strict=True)
    return torch.tensor([np.count_nonzero(row > of_target) for row, of_target in pairs])


def _parts(row: TokenRow, tokens: Tokens) -> dict[str, Tokens]:
    """The tokens of a row's answer and, if it has one, of its reasoning."""
    if row.answer is None:
        return {"answer": tokens}
    return {"reasoning": tokens[: row.answer - row.start], "answer": tokens[row.answer - row.start :]}


def _pieces(row: TokenRow, name: str) -> Iterator[TokenRow]:
    """The rows in which a student reads a response once more: without its prompt, or each window by itself."""
    n = len(row.ids)
    if name == "alone":
        yield _piece(row, row.start, row.start, n)
        return
    for begin in range(row.start, n, learnability.WINDOW):
        yield _piece(row, max(row.start, begin - learnability.CONTEXT), begin, min(begin + learnability.WINDOW, n))


def _piece(row: TokenRow, context: int, begin: int, end: int) -> TokenRow:
    """The row's ids from `begin` to `end`, after its frame and the ids from `context` on."""
    # Without a frame, the token before the response: each scored token needs one before it.
    frame = [*(row.frame or row.ids[row.start - 1 : row.start])]
    start = len(frame) + begin - context
    answer = None if row.answer is None else start + min(max(row.answer - begin, 0), end - begin)
    return TokenRow(row.id, [*frame, *row.ids[context:end]], start, answer)


class _Hidden(BaseModelOutputWithPast):
    """A decoder output with only the hidden states; every other attribute is None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Replaces the decoder and returns the hidden states it is given."""

    def forward(self, _input_ids: Tensor | None = None, *, inputs_embeds: torch.FloatTensor, **_: Any) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)


def _split(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The decoder, and a view of the model that computes the rest with the same weights.

    What follows the decoder differs between architectures (soft-capped, scaled or plain logits), so the
    model's own code is used.
    """
    head = copy(model)
    # With several GPUs, accelerate sets an instance attribute `forward` that still calls the original.
    head.__dict__.pop("forward", None)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    return model.base_model, head
