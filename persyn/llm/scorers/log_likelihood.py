"""Score learnability: the log-likelihood of a response under the student, a sum in nats."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from jinja2 import TemplateError
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

#: Positions passed through the LM head at once: 0.3 GB in float32 with a vocabulary of 152,000.
_HEAD_ROWS = 512
#: Minimum number of logits at once on a GPU, i.e. more positions for a small vocabulary: 0.3 GB in float32.
_HEAD_LOGITS = 2**26
#: Logits converted to float32 at once on a CPU.
_CACHED = 2_000_000


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a student that answers `Judge` with the log-likelihood of the response.

    The value is the sum over the answer's tokens, its end token included, given the conversation and
    the reasoning in the student's own chat format; `n_tokens` is their number. The reasoning's sum and
    number, with its closing marker, are separate. A response that exceeds the model's context together
    with its conversation fails as `too_long`; it is truncated only if an option says so.
    """
    chosen = options.decode(spec, options.LogLikelihoodOptions)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos, variables=chosen.chat_template_kwargs)
    template_check.require(spec, chat)
    model = scoring.load_weights(AutoModelForCausalLM, spec, chosen)

    def row(request: Judge, found: EncodedResponse | TemplateError) -> TokenRow | Failed:
        if isinstance(found, TemplateError):
            return refused(request, found)
        end = None if chosen.response_tokens is None else found.start + chosen.response_tokens
        return TokenRow(request.id, found.ids[:end], found.start, found.answer)

    def encode(requests: Sequence[Judge]) -> list[TokenRow | Failed]:
        found = chat.all_response_ids(
            [
                Conversation(each.messages, each.response, each.reasoning, each.tool_calls, each.tools)
                for each in requests
            ]
        )
        return [row(*pair) for pair in zip(requests, found, strict=True)]

    padded = Padded(
        encode,
        StudentScorer(model).judge,
        max_tokens=scoring.max_tokens(model.config),
        batch_tokens=scoring.batch_tokens(spec, chosen),
        tick=tick,
    )
    return Batched(padded.compute, version=scoring.VERSION, chunk=scoring.CHUNK)


class StudentScorer:
    """A causal language model, split into decoder and head so that the head only sees scored positions.

    If the head applied to the decoder's hidden states does not give the model's logits, all logits are computed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._parts: tuple[nn.Module, nn.Module] | None = _split(model)
        self._mates = BatchRule(model)
        self._device = model.device
        self._detail = scoring.describe(model)
        vocabulary = self._check()
        self._head_rows = _HEAD_ROWS if self._device.type == "cpu" else max(_HEAD_ROWS, _HEAD_LOGITS // vocabulary)

    def judge(self, rows: Sequence[TokenRow]) -> list[Judged]:
        """The log-likelihood of each row's ids from `start` on, those before `answer` apart."""
        return self._mates.compute(rows, [len(row.ids) for row in rows], self._judge)

    @torch.inference_mode()
    def _judge(self, rows: Sequence[TokenRow]) -> list[Judged]:
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
        log_probabilities = self._log_probabilities(chosen, targets.to(hidden.device))  # (N,)

        of_rows = torch.split(log_probabilities, [len(row.ids) - row.start for row in rows])
        return [self._judged(row, each) for row, each in zip(rows, of_rows, strict=True)]

    def _judged(self, row: TokenRow, log_probabilities: Tensor) -> Judged:
        if row.answer is None:
            return Judged(row.id, log_probabilities.sum().item(), len(log_probabilities), detail=self._detail)
        reasoning, answer = log_probabilities.tensor_split([row.answer - row.start])
        return Judged(
            row.id,
            answer.sum().item(),
            len(answer),
            reasoning_value=reasoning.sum().item(),
            reasoning_n_tokens=len(reasoning),
            detail=self._detail,
        )

    def _log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N,) float64 log-probability of each target after its (N, H) hidden state, on the CPU."""
        parts = []
        n = self._head_rows
        for states, tokens in zip(torch.split(hidden, n), torch.split(targets, n), strict=True):
            logits = self._logits(states)  # (n, V)
            # On a CPU, pieces that fit its cache are faster and avoid page faults of a large tensor.
            rows = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
            for some, chosen in zip(torch.split(logits, rows), torch.split(tokens, rows), strict=True):
                parts.append(_chosen(some.float(), chosen.to(logits.device)).double())
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


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) log-probability of each target under (n, V) logits, which are overwritten."""
    found = logits.gather(1, targets[:, None]).squeeze(1)
    # In-place logsumexp: a third of the time, and no second tensor of this size.
    highest = logits.amax(1)
    total = logits.sub_(highest[:, None]).exp_().sum(1)
    return found - highest - total.log()


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
