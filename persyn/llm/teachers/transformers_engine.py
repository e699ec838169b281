"""Teachers on plain transformers, for machines and models that vLLM does not support.

Every row of a batch is sampled independently, with its own seed and its own end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from persyn.errors import PermanentError, shorten
from persyn.llm import adapters, fidelity, options, scoring, template_check
from persyn.llm.adapters import Adapter
from persyn.llm.batch_rule import BatchRule
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Engine, Failed, Generate, ModelSpec, Request, Result, Tick
from persyn.llm.teachers import generation, results, sampling
from persyn.llm.teachers.generation import EncodedPrompt
from persyn.llm.tool_forms import ReadCalls

#: Batches taken at once and sorted by length.
_CHUNK_BATCHES = 4


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a teacher that answers `Generate`.

    `max_tokens` is lowered to the room the context leaves after the prompt. `response_tokens` includes the end token;
    `seconds` is from the start of the batch to the row's last token. Options: `options.TransformersOptions`.
    """
    chosen = options.decode(spec, options.TransformersOptions)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos, variables=chosen.chat_template_kwargs)
    template_check.require(spec, chat)
    found = adapters.find(spec)
    dtype = chosen.dtype or ("bfloat16" if spec.gpus else "float32")
    model = scoring.load_weights(AutoModelForCausalLM, spec, options.ScorerOptions(dtype=dtype))
    engine = TransformersEngine(
        model,
        chat,
        batch_size=chosen.batch_size,
        context=chosen.max_model_len,
        tick=tick,
        read_calls=generation.call_reader(chat, chosen.tool_parser),
    )
    engine.load_adapters(found)
    return Batched(engine.compute, version=scoring.VERSION, chunk=_CHUNK_BATCHES * chosen.batch_size)


class TransformersEngine:
    """A causal language model that generates responses in left-padded batches.

    context:    tokens of prompt and response together, at most the model's own limit; None is that limit.
    read_calls: reads the calls in a response to a prompt with tools; None leaves them in the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        *,
        batch_size: int,
        context: int | None,
        tick: Tick,
        read_calls: ReadCalls | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._read_calls = read_calls
        self._model: Any = model
        self._chat = chat
        self._splits = generation.reader(chat)
        self._positions = scoring.max_tokens(model.config)
        self._context = min((n for n in (context, self._positions) if n), default=None)
        self._tick = tick
        #: The model with adapters, which share its weights; None without any.
        self._adapted: Any = None
        #: Its own names of the adapters, by ours.
        self._adapters: dict[str, str] = {}
        self._end_ids = _end_ids(model, chat)
        pad_id = chat.tokenizer.pad_token_id
        self._pad_id = chat.end_id if pad_id is None else int(pad_id)
        # The model's own generation config would replace values that a request leaves at their defaults.
        model.generation_config = GenerationConfig(pad_token_id=self._pad_id)
        self._mates = BatchRule(model, sees_padding=self._sees_padding())

    def load_adapters(self, found: Mapping[str, Adapter]) -> None:
        """Load adapters beside each other; `PermanentError` for one that does not fit."""
        for number, (name, adapter) in enumerate(found.items()):
            from peft import PeftConfig, PeftModel

            own = self._adapters[name] = f"adapter{number}"
            try:
                if self._adapted is None:
                    config = PeftConfig.from_pretrained(str(adapter.folder))
                    self._adapted = PeftModel(self._model, config, adapter_name=own)
                loaded = self._adapted.load_adapter(str(adapter.folder), adapter_name=own)
            except (OSError, RuntimeError, ValueError) as error:
                raise PermanentError(f"cannot load the adapter {name!r}: {shorten(str(error), most=500)}") from error
            # The weights of the model and of the other adapters count as missing, too.
            missing = {key for key in loaded.missing_keys if f".{own}." in key}
            if wrong := sorted({*missing, *loaded.unexpected_keys}):
                raise PermanentError(f"the adapter {name!r} does not fit the model: {shorten(', '.join(wrong))}")
        self._model.eval()

    def _choose(self, adapter: str | None) -> None:
        """Compute with one adapter, or with none."""
        if self._adapted is None:
            return
        if adapter is None:
            self._adapted.base_model.disable_adapter_layers()
        else:
            self._adapted.base_model.enable_adapter_layers()
            self._adapted.set_adapter(self._adapters[adapter])

    def compute(self, requests: Iterable[Request]) -> Iterator[list[Result]]:
        """Yield the failures first, then each batch's results, longest prompts first."""
        prompts: list[EncodedPrompt] = []
        failures: list[Result] = []
        for request in requests:
            assert isinstance(request, Generate)
            prepared = generation.prepare(self._chat, request, self._context, self._splits)
            if isinstance(prepared, Failed):
                failures.append(prepared)
            else:
                prompts.append(prepared)
        if failures:
            yield failures
        for alike in _groups(prompts):
            yield from self._compute_alike(alike)

    def _compute_alike(self, prompts: list[EncodedPrompt]) -> Iterator[list[Result]]:
        """Answer prompts with equal sampling, longest first, so that insufficient memory shows at once."""
        while prompts:
            batch = self._first_batch(prompts)
            results = self._attempt(batch)
            if results is not None:
                prompts = prompts[len(batch) :]
                yield results

    def _first_batch(self, prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
        """The first prompts that may share a batch: a long row keeps growing while shorter ones are unfinished.

        With learned positions, as in GPT-2, growing past the last position is an error. Where a batch is computed at
        the length of its longest row, growing past `BatchRule.same_up_to` would change the other rows' results.
        """
        longest = len(prompts[0].ids)
        bounds = (n for n in (self._positions, self._mates.same_up_to) if n)
        room = min(bounds, default=sys.maxsize) - longest
        shortest = longest if self._mates.sees_padding else 0
        batch = takewhile(lambda p: p.max_tokens <= room and len(p.ids) >= shortest, prompts[: self.batch_size])
        return list(batch) or prompts[:1]

    @torch.inference_mode()
    def _sees_padding(self) -> bool:
        """Whether padding changes a row's continuation: some recurrent models ignore the mask."""

        def scores(rows: list[list[int]]) -> Tensor:
            ids = torch.tensor([[self._pad_id] * (8 - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (8 - len(row)) + [1] * len(row) for row in rows])
            ids, mask = (each[:, -max(map(len, rows)) :].to(self._model.device) for each in (ids, mask))
            how = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
            logits: Tensor = self._model.generate(ids, attention_mask=mask, **how).logits[0][0]
            return logits.float()

        short, long = [1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8]
        return not fidelity.is_alike(scores([short]), scores([short, long]))

    def _attempt(self, batch: Sequence[EncodedPrompt]) -> list[Result] | None:
        """The batch's results, or None if a smaller batch must be tried."""
        try:
            processors = sampling.processors(batch, self._model.device)
            if any(prompt.request.sampling.max_reasoning_tokens is not None for prompt in batch):
                processors.append(sampling.ReasoningLimit(batch, self._splits, self._chat))
        except ValueError as error:
            return [generation.refuse(prompt.request, str(error)) for prompt in batch]
        try:
            return self._write(batch, processors)
        except torch.OutOfMemoryError:
            pass
        # After the except block, since the traceback keeps the batch's tensors alive.
        torch.cuda.empty_cache()
        if len(batch) == 1:
            return [Failed(batch[0].request.id, f"out_of_memory: {len(batch[0].ids):,} tokens and their response")]
        self.batch_size = len(batch) // 2
        return None

    @torch.inference_mode()
    def _write(self, batch: Sequence[EncodedPrompt], processors: LogitsProcessorList) -> list[Result]:
        self._mates.reset()
        self._choose(batch[0].request.adapter)
        width = max(len(prompt.ids) for prompt in batch)
        gaps = [width - len(prompt.ids) for prompt in batch]
        ids = torch.tensor([[self._pad_id] * gap + prompt.ids for gap, prompt in zip(gaps, batch, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])  # (B, L)
        stops = generation.stop_texts(self._chat, batch[0].request.sampling)
        criteria = sampling.RowStoppingCriteria(self._chat.tokenizer, self._end_ids, stops, batch, self._tick)
        written = self._model.generate(
            ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=max(prompt.max_tokens for prompt in batch),
            do_sample=False,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([criteria]),
        )
        rows = written[:, width:].tolist()
        return [self._result(*row, stops) for row in zip(batch, rows, criteria.lengths, criteria.seconds, strict=True)]

    def _result(
        self, prompt: EncodedPrompt, row: list[int], length: int, seconds: float, stops: Sequence[str]
    ) -> Result:
        ids = row[:length]
        is_ended = ids[-1] in self._end_ids
        ids = ids[:-1] if is_ended else ids
        parts = self._splits.read(ids, prompt.tail, stops)
        finish = "stop" if is_ended or parts.is_cut else "length"
        detection = prompt.request.sampling.repetition_detection
        if finish == "length" and length < prompt.max_tokens and detection and generation.repeats(ids, detection):
            finish = results.REPETITION
        raw = generation.raw_answer(self._chat, ids, parts, self._splits.markers, stops) if prompt.request.tools else ""
        generated = generation.finished(prompt, parts, finish, length, seconds)
        said = generation.with_calls(generated, self._read_calls, raw, prompt.request.tools)
        return said if isinstance(said, Failed) else results.to_result(said)


def _groups(prompts: Iterable[EncodedPrompt]) -> Iterator[list[EncodedPrompt]]:
    """Groups of prompts that may share a batch, longest first."""

    def kind(prompt: EncodedPrompt) -> tuple[str, bytes]:
        # Each row has its own `max_tokens`.
        how = msgspec.structs.replace(prompt.request.sampling, max_tokens=1)
        return prompt.request.adapter or "", msgspec.json.encode(how)

    for _, alike in groupby(sorted(prompts, key=lambda p: (*kind(p), -len(p.ids))), kind):
        yield list(alike)


def _end_ids(model: PreTrainedModel, chat: Chat) -> frozenset[int]:
    """Every token that ends a response: those of the template, the tokenizer and the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (chat.end_id, chat.tokenizer.eos_token_id, *named) if token is not None)
