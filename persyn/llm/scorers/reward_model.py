"""Score quality with a reward model: its raw logit for a response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForSequenceClassification, PreTrainedModel

from persyn.errors import PermanentError
from persyn.llm import fidelity, options, scoring, template_check
from persyn.llm.batch_rule import BatchRule
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Tick
from persyn.llm.scorers.padding import Padded, TokenRow, refused, right_pad


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a sequence classifier with one label that answers `Judge` with its logit, without an activation function.

    The conversation is formatted by the model's own chat template, with the response as the assistant's turn.
    A conversation longer than the context fails as `too_long`. Options: `options.RewardModelOptions`.
    """
    chosen = options.decode(spec, options.RewardModelOptions)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos, variables=chosen.chat_template_kwargs)
    _check(spec, chat)
    template_check.require(spec, chat, answers=False)
    model = scoring.load_weights(AutoModelForSequenceClassification, spec, chosen)

    def row(request: Judge) -> TokenRow | Failed:
        try:
            ids = chat.conversation_ids(request.messages, request.response, request.tool_calls, request.tools)
            return TokenRow(request.id, ids)
        except TemplateError as error:
            return refused(request, error)

    def encode(requests: Sequence[Judge]) -> list[TokenRow | Failed]:
        return [row(request) for request in requests]

    padded = Padded(
        encode,
        RewardModel(model).judge,
        max_tokens=scoring.max_tokens(model.config),
        batch_tokens=scoring.batch_tokens(spec, chosen),
        tick=tick,
    )
    return Batched(padded.compute, version=scoring.VERSION, chunk=scoring.CHUNK)


class RewardModel:
    """A sequence classifier whose head reads each row's last token, whatever that token is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # XLNet and similar models summarise a row at its last position, even if that is padding.
        self._mates = BatchRule(model, sees_padding=hasattr(model, "sequence_summary"))
        self._how = fidelity.without_cache(model)
        self._detail = scoring.describe(model)

    def judge(self, rows: Sequence[TokenRow]) -> list[Judged]:
        """The logit of each row."""
        return self._mates.compute(rows, [len(row.ids) for row in rows], self._judge)

    @torch.inference_mode()
    def _judge(self, rows: Sequence[TokenRow]) -> list[Judged]:
        pad_id = self._choose_pad({row.ids[-1] for row in rows})
        ids = right_pad(rows, pad_id, self._model.device)  # (B, L)
        lengths = torch.tensor([len(row.ids) for row in rows], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = self._model(input_ids=ids, attention_mask=mask.long(), **self._how).logits  # (B, 1)
        values = logits[:, 0].double().tolist()
        return [Judged(row.id, value, detail=self._detail) for row, value in zip(rows, values, strict=True)]

    def _choose_pad(self, last_ids: set[int]) -> int:
        """Choose a padding id that ends no row, and set it in the model's configuration.

        The head reads the rightmost token that is not padding. If the padding token is also the end token,
        as in many models that define no other, it would miss the token it has to read.
        """
        config = self._model.config.get_text_config()
        if config.pad_token_id is None or config.pad_token_id in last_ids:
            config.pad_token_id = next(token for token in range(config.vocab_size) if token not in last_ids)
        return int(config.pad_token_id)


def _check(spec: ModelSpec, chat: Chat) -> None:
    config = scoring.configuration(spec)
    if config.num_labels != 1:
        raise PermanentError(f"{spec.model!r} is not a reward model: expected 1 label, found {config.num_labels}")
    # Masked language models, such as BERT and DeBERTa, classify at their first token.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not chat.has_template:
        raise PermanentError(
            f"{spec.model!r} is an encoder, which scores at its first token, such as [CLS]; give its tokenizer a chat "
            "template that writes conversations as in the model's training, including that token, or use a reward "
            "model that has one"
        )
