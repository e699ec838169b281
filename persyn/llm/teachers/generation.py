"""Convert requests to token ids and generated text to results, for all local teachers.

Independent of models; needs only tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from msgspec.structs import replace

from persyn.errors import shorten
from persyn.llm import tool_forms
from persyn.llm.chat import PLAIN_STOP, Chat
from persyn.llm.protocols import Failed, Generate, Generated, Sampling, Tools
from persyn.llm.tool_forms import ReadCalls


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A request in its model's form."""

    request: Generate
    ids: list[int]
    #: Maximum number of tokens of the response.
    max_tokens: int


def prepare(chat: Chat, request: Generate, context: int | None) -> EncodedPrompt | Failed:
    """Convert a request to its model's form.

    context: tokens of prompt and response together; None when the model sets no bound. A prompt that
             leaves no room for a single token fails as `too_long`. `max_tokens` is lowered to the
             remaining room, so a response may end with "length" before the sampling's `max_tokens`.
    """
    try:
        ids = chat.prompt_ids(request.messages, request.tools)
    except TemplateError as error:
        return refuse(request, f"the chat template rejects the conversation: {error}")
    if request.sampling.max_tokens < 1:
        return refuse(request, f"max_tokens must be at least 1, got {request.sampling.max_tokens}")
    room = request.sampling.max_tokens if context is None else context - len(ids)
    if room < 1:
        return Failed(request.id, f"too_long: {len(ids):,} tokens, the model takes {context:,} including the response")
    return EncodedPrompt(request, ids, min(request.sampling.max_tokens, room))


def refuse(request: Generate, why: str) -> Failed:
    """The failure of a request that cannot be served as it is."""
    return Failed(request.id, f"bad_request: {shorten(why)}")


def to_result(generated: Generated) -> Generated | Failed:
    """The result with its text stripped; fails as `empty` if nothing is left and it calls no tool.

    NUL characters, which PostgreSQL cannot store, are replaced.
    """
    text = generated.text.replace("\0", "\N{REPLACEMENT CHARACTER}").strip()
    if not text and not generated.tool_calls:
        return Failed(generated.id, f"empty: no text, finish reason {generated.finish_reason or 'unknown'}")
    is_call = generated.tool_calls and generated.finish_reason == "stop"
    return replace(generated, text=text, finish_reason="tool_calls" if is_call else generated.finish_reason)


def with_calls(generated: Generated, read: ReadCalls | None, raw: str, tools: Tools | None) -> Generated | Failed:
    """The result with its calls, if the request has tools; fails as `bad_tool_call` if one is malformed.

    raw: the generated text with its special tokens, without the end token.
    """
    if read is None or not tools:
        return generated
    try:
        said = read(raw, tools)
    except ValueError as error:
        finish = generated.finish_reason or "unknown"
        return Failed(generated.id, f"bad_tool_call: {shorten(str(error))}, finish reason {finish}")
    return replace(generated, text=said.text, tool_calls=said.calls) if said and said.calls else generated


def raw_text(chat: Chat, ids: Sequence[int], stops: Sequence[str], *, is_ended: bool) -> str:
    """A generated text with its special tokens, up to the end token or the first stop text.

    is_ended: whether the last id is the end token.
    """
    kept = list(ids[:-1] if is_ended else ids)
    return cut(str(chat.tokenizer.decode(kept, clean_up_tokenization_spaces=False)), stops)[0]


def call_reader(chat: Chat, name: str | None) -> ReadCalls | None:
    """How to read the calls of a model: by the named form, or by the one that its chat template writes.

    None if the template's form is not known: calls remain a part of the text.
    """
    form = tool_forms.written_by(chat.template) if name is None else tool_forms.FORMS[name]
    return None if form is None else lambda text, tools: form(text)


def stop_texts(chat: Chat, sampling: Sampling) -> list[str]:
    """The texts that end a response: the sampling's and, for a base model, the beginning of the next turn."""
    return sampling.stop if chat.has_template else [*sampling.stop, PLAIN_STOP]


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one."""
    found = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
