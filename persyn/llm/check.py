"""Check a teacher before a run: chat template, context length, dtype, vocabulary, logits and BOS.

Most of these problems raise no error: a model without its BOS token, for example, writes fluent nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from yarl import URL

from persyn.errors import EngineError
from persyn.llm import adapters, options, scoring, template_check
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.engines import ENGINES, hosted_options
from persyn.llm.options import Dtype
from persyn.llm.protocols import (
    Check,
    Checked,
    Engine,
    Failed,
    Finding,
    Generate,
    Message,
    ModelSpec,
    Request,
    Result,
    Sampling,
    Tick,
    Tools,
)
from persyn.llm.teachers import addresses, generation

_Options: TypeAlias = options.VllmOptions | options.TransformersOptions
_Prompt: TypeAlias = tuple[list[Message], Tools | None]

#: Plain prose that every language model finds likely.
_SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome. Both cities lie on a river."
#: Difference in nats per token from which BOS matters. A model that needs it loses several without.
_MUCH_NATS = 1.0


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Make an engine that answers `Check`; it loads each teacher's model when asked about it."""

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Check)
            yield [Checked(request.id, check(request.spec, request.conversations, request.max_tokens, request.tools))]

    return Batched(compute, version=scoring.VERSION, chunk=1)


def check(
    spec: ModelSpec, conversations: list[list[Message]], max_tokens: int, tools: Sequence[Tools | None] = ()
) -> list[Finding]:
    """Check a teacher; loads its model once and sends nothing to any server.

    conversations: prompts it will be given.
    max_tokens:    maximum number of tokens of a response.
    tools:         the tools of each prompt; empty if none has any.
    """
    try:
        kind = ENGINES[spec.engine]
        if kind.model == "server":
            return _check_server(spec)
        if kind.model == "weights":
            return list(_check_model(spec, list(zip_longest(conversations, tools)), max_tokens))
        return [Finding("ok", "load", f"the engine {spec.engine!r} has no model to check")]
    except EngineError as error:
        return [Finding("error", "load", str(error))]


def _check_server(spec: ModelSpec) -> list[Finding]:
    chosen = hosted_options(spec)
    addresses.read_key(chosen)
    found = [_will_receive(spec, chosen, addresses.endpoint(base_url)) for base_url in chosen.urls]
    return [*found, _reasoning_of_server(chosen)]


def _will_receive(spec: ModelSpec, chosen: options.HostedOptions, url: URL) -> Finding:
    way = addresses.proxy(url)
    key = chosen.key_source + (f", by the proxy {way.host}" if way else "")
    return Finding("ok", "server", f"{url} will receive requests for {spec.model!r} with {key}; nothing was sent yet")


def _reasoning_of_server(chosen: options.HostedOptions) -> Finding:
    inline = {
        "auto": "a response's text is searched for markers such as <think>",
        "opened": "a response's text begins inside the reasoning",
        "off": "a response's text is kept as it is",
    }[chosen.inline_reasoning]
    return Finding("ok", "reasoning", f"reasoning that the server reports apart is separated; otherwise, {inline}")


def _check_model(spec: ModelSpec, prompts: Sequence[_Prompt], max_tokens: int) -> Iterator[Finding]:
    chosen = _decode(spec)
    for adapter in adapters.find(spec).values():
        yield adapters.look_over(adapter, spec.model)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos, variables=chosen.chat_template_kwargs)
    about_template = template_check.look_over(chat)
    yield from about_template
    if isinstance(chosen, options.VllmOptions) and chosen.reasoning_parser is not None:
        message = f"options.reasoning_parser is {chosen.reasoning_parser!r}: it decides instead of the markers"
        yield Finding("ok", "reasoning", message)
    if any(finding.level == "error" for finding in about_template):
        return
    yield _padding(chat)
    stored = scoring.stored_dtype(scoring.configuration(spec))
    used = _used_dtype(spec, chosen, stored)
    yield _dtype(stored, used)
    model = scoring.load_weights(AutoModelForCausalLM, spec, options.ScorerOptions(dtype=used))
    made_for = scoring.max_tokens(model.config)
    yield _vocabulary(chat, model)
    yield from _logits(chat, model)
    context = min((n for n in (chosen.max_model_len, made_for) if n), default=None)
    yield _context(chat, prompts, max_tokens, context)


def _decode(spec: ModelSpec) -> _Options:
    if spec.engine == "vllm":
        return options.decode(spec, options.VllmOptions)
    return options.decode(spec, options.TransformersOptions)


def _padding(chat: Chat) -> Finding:
    pad, tokenizer = chat.tokenizer.pad_token_id, chat.tokenizer
    if pad is None:
        return Finding("warning", "padding", "no pad token; batches are padded with the end token, which is masked")
    if pad in {chat.end_id, tokenizer.eos_token_id}:
        return Finding(
            "warning",
            "padding",
            f"the pad token {tokenizer.pad_token!r} also ends a response; it is masked here, but a training that"
            " ignores pad tokens would never learn to end a response",
        )
    return Finding("ok", "padding", f"the pad token is {tokenizer.pad_token!r}")


def _vocabulary(chat: Chat, model: PreTrainedModel) -> Finding:
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    tokens = 1 + max(chat.tokenizer.get_vocab().values())
    if tokens > rows:
        return Finding("error", "vocabulary", f"the tokenizer has {tokens:,} tokens, the model embeds only {rows:,}")
    return Finding("ok", "vocabulary", f"{tokens:,} tokens, {rows:,} embeddings")


def _used_dtype(spec: ModelSpec, chosen: _Options, stored: str | None) -> Dtype:
    """The dtype the engine will compute in."""
    if chosen.dtype is not None and chosen.dtype != "auto":
        return chosen.dtype
    if spec.engine == "transformers":
        return "bfloat16" if spec.gpus else "float32"
    # Like vLLM, which does not choose float32 by itself.
    return "float16" if stored == "float16" else "bfloat16"


def _dtype(stored: str | None, used: Dtype) -> Finding:
    loss = {
        ("float32", "bfloat16"): "they are rounded to 8 bits",
        ("float32", "float16"): "they are rounded to 11 bits, and values beyond 65,504 overflow",
        ("bfloat16", "float16"): "values beyond 65,504 overflow",
        ("float16", "bfloat16"): "they are rounded to 8 bits",
    }.get((stored or "", used))
    if loss:
        return Finding("warning", "dtype", f"the weights are stored as {stored} and run as {used}: {loss}")
    return Finding("ok", "dtype", f"the weights are stored as {stored or 'an unknown type'} and run as {used}")


def _logits(chat: Chat, model: PreTrainedModel) -> Iterator[Finding]:
    """Check that the logits of a plain sentence are finite, and whether BOS makes the sentence likelier."""
    ids = chat.encode(_SENTENCE)
    without = _mean_log_likelihood(model, ids[:1], ids[1:])
    if not math.isfinite(without):
        yield Finding("error", "logits", f"a plain sentence has the log-likelihood {without}; try another dtype")
        return
    yield Finding("ok", "logits", f"a plain sentence has {without:.2f} nats per token")
    bos = chat.tokenizer.bos_token_id
    if bos is None:
        yield Finding("ok", "bos", "the tokenizer has no BOS token")
    else:
        is_used = chat.prompt_ids([{"role": "user", "content": _SENTENCE}])[0] == bos
        yield judge_bos(_mean_log_likelihood(model, [bos, *ids[:1]], ids[1:]), without, is_used=is_used)


def judge_bos(with_bos: float, without: float, *, is_used: bool) -> Finding:
    """Judge whether prompts begin as the model needs it.

    with_bos, without: a plain sentence's mean log-likelihood, nats per token.
    is_used:           whether prompts begin with BOS.
    """
    measured = f"a plain sentence has {with_bos:.2f} nats per token with BOS and {without:.2f} without"
    prompts = f"prompts begin {'with' if is_used else 'without'} it"
    if with_bos - without > _MUCH_NATS and not is_used:
        return Finding("error", "bos", f"{measured}, but {prompts}: set add_bos = true, or correct the chat template")
    if without - with_bos > _MUCH_NATS and is_used:
        return Finding("warning", "bos", f"{measured}, but {prompts}: try add_bos = false")
    return Finding("ok", "bos", f"{measured}; {prompts}")


@torch.inference_mode()
def _mean_log_likelihood(model: PreTrainedModel, before: Sequence[int], tokens: Sequence[int]) -> float:
    """Mean log-likelihood of `tokens` after `before`, nats per token; NaN if the logits are NaN."""
    ids = torch.tensor([[*before, *tokens]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].float()  # (L, V)
    if not torch.isfinite(logits).all():
        return math.nan
    return -torch.nn.functional.cross_entropy(logits, ids[0, len(before) :]).item()


def _context(chat: Chat, given: Sequence[_Prompt], max_tokens: int, context: int | None) -> Finding:
    how = Sampling(max_tokens=max_tokens)
    requests = [Generate(i, turns, how, 0, tools=tools) for i, (turns, tools) in enumerate(given)]
    prepared = [generation.prepare(chat, request, context) for request in requests]
    failed = [each.reason for each in prepared if isinstance(each, Failed)]
    prompts = [each for each in prepared if not isinstance(each, Failed)]
    if failed:
        message = f"{len(failed):,} of {len(prepared):,} prompts cannot be answered; the first: {failed[0]}"
        return Finding("warning" if prompts else "error", "context", message)
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    bound = "any length" if context is None else f"{context:,} tokens"
    n_cut = sum(prompt.max_tokens < max_tokens for prompt in prompts)
    if n_cut:
        message = f"{n_cut:,} of {len(prompts):,} prompts leave fewer than {max_tokens:,} tokens for the response"
        return Finding("warning", "context", f"{message}: the longest has {longest:,}, the model takes {bound}")
    return Finding("ok", "context", f"the longest prompt has {longest:,} tokens, the model takes {bound}")
