"""Convert requests to token ids and generated text to results, for all local teachers.

Independent of models; needs only tokenizers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import TemplateError
from msgspec.structs import replace

from persyn.config import RepetitionDetection
from persyn.errors import shorten
from persyn.llm import tool_forms
from persyn.llm.chat import PLAIN_STOP, Chat
from persyn.llm.protocols import Failed, Generate, Generated, Sampling, Tools, failed
from persyn.llm.reasoning import MarkerReader, Markers, Parts, Reader, cut
from persyn.llm.tool_forms import ReadCalls
from persyn.llm.tool_template import ToolTemplate


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A request in its model's form."""

    request: Generate
    ids: list[int]
    #: Maximum number of tokens of the response.
    max_tokens: int
    #: What the template writes after the last turn; "" where no reader needs it.
    tail: str = ""


def reader(chat: Chat) -> MarkerReader:
    """What separates reasoning and answer in the responses of a model with this form."""
    return MarkerReader(chat.tokenizer, _source(chat))


def prepare(chat: Chat, request: Generate, context: int | None, splits: Reader | None = None) -> EncodedPrompt | Failed:
    """Convert a request to its model's form.

    context: tokens of prompt and response together; None when the model sets no bound. A prompt that
             leaves no room for a single token fails as `too_long`. `max_tokens` is lowered to the
             remaining room, so a response may end with "length" before the sampling's `max_tokens`.
    splits:  reads the response later.
    """
    how = request.sampling
    if how.reasoning_effort is not None:
        if "reasoning_effort" not in _source(chat):
            return refuse(request, "reasoning_effort is set, but the chat template has no such variable")
        chat = _with_effort(chat, how.reasoning_effort)
    if how.max_reasoning_tokens is not None and splits is not None and splits.markers is None:
        return refuse(request, "max_reasoning_tokens is set, but no reasoning markers of the model are known")
    try:
        ids = chat.prompt_ids(request.messages, request.tools)
        tail = _tail(chat, request) if splits is not None and splits.reads_prompt else ""
    except TemplateError as error:
        return refuse(request, f"the chat template rejects the conversation: {error}")
    if how.max_tokens < 1:
        return refuse(request, f"max_tokens must be at least 1, got {how.max_tokens}")
    room = how.max_tokens if context is None else context - len(ids)
    if room < 1:
        return Failed(request.id, f"too_long: {len(ids):,} tokens, the model takes {context:,} including the response")
    return EncodedPrompt(request, ids, min(how.max_tokens, room), tail)


def _source(chat: Chat) -> str:
    return str(chat.tokenizer.chat_template or "")


@lru_cache(maxsize=16)
def _with_effort(chat: Chat, effort: str) -> Chat:
    """The same form with another value of the template's variable."""
    assert chat.template is not None
    other = copy.copy(chat)
    other.template = ToolTemplate(chat.tokenizer, {**chat.template.variables, "reasoning_effort": effort})
    return other


def _tail(chat: Chat, request: Generate) -> str:
    if chat.template is None:
        return ""
    written = chat.template.prompt(request.messages, request.tools)
    return written.text[max(end for _, end in written.spans) :]


def refuse(request: Generate, why: str) -> Failed:
    """The failure of a request that cannot be served as it is."""
    return Failed(request.id, f"bad_request: {shorten(why)}")


def finished(prompt: EncodedPrompt, parts: Parts, finish_reason: str, n_tokens: int, seconds: float) -> Generated:
    """A local response of `n_tokens` tokens, whose calls are still in its text."""
    return Generated(
        id=prompt.request.id,
        text=parts.answer,
        finish_reason=finish_reason,
        prompt_tokens=len(prompt.ids),
        response_tokens=n_tokens,
        seconds=seconds,
        reasoning=parts.reasoning,
        reasoning_tokens=parts.reasoning_tokens,
    )


def with_calls(generated: Generated, read: ReadCalls | None, raw: str, tools: Tools | None) -> Generated | Failed:
    """The result with its calls, if the request has tools; fails as `bad_tool_call` if one is malformed.

    raw: the generated text after the reasoning with its special tokens, without the end token.
    """
    if read is None or not tools:
        return generated
    try:
        said = read(raw, tools)
    except ValueError as error:
        finish = generated.finish_reason or "unknown"
        return failed(generated, f"bad_tool_call: {shorten(str(error))}, finish reason {finish}")
    return replace(generated, text=said.text, tool_calls=said.calls) if said and said.calls else generated


def raw_text(chat: Chat, ids: Sequence[int], stops: Sequence[str]) -> str:
    """A generated text, without its end token, with its special tokens, up to the first stop text."""
    return cut(str(chat.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)), stops)[0]


def raw_answer(chat: Chat, ids: Sequence[int], parts: Parts, markers: Markers | None, stops: Sequence[str]) -> str:
    """The `raw_text` of the answer; without special tokens where its place in the text is unknown.

    ids: the response; `parts` is what a reader with these markers found in it.
    """
    if parts.reasoning_tokens is not None:
        return raw_text(chat, ids[parts.reasoning_tokens :], stops)
    # A call that the reasoning only mentions must not be read.
    _, reasoning, after = raw_text(chat, ids, stops).partition(parts.reasoning or "\0")
    _, closes, answer = after.partition(markers.closes if markers else "\0")
    return answer if reasoning and closes else parts.answer


def call_reader(chat: Chat, name: str | None) -> ReadCalls | None:
    """How to read the calls of a model: by the named form, or by the one that its chat template writes.

    None if the template's form is not known: calls remain a part of the text.
    """
    form = tool_forms.written_by(chat.template) if name is None else tool_forms.FORMS[name]
    return None if form is None else lambda text, tools: form(text)


def repeats(ids: Sequence[int], detection: RepetitionDetection) -> bool:
    """Whether token ids end in a repeated pattern; the rule is vLLM's."""
    for size in range(detection.min_pattern_size, detection.max_pattern_size + 1):
        length = size * detection.min_count
        if length > len(ids):
            return False
        if list(ids[-length:]) == list(ids[-size:]) * detection.min_count:
            return True
    return False


def stop_texts(chat: Chat, sampling: Sampling) -> list[str]:
    """The texts that end a response: the sampling's and, for a base model, the beginning of the next turn."""
    return sampling.stop if chat.has_template else [*sampling.stop, PLAIN_STOP]
