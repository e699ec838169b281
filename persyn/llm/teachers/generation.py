"""Convert requests to token ids and generated text to results, for all local teachers.

Independent of models; needs only tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from persyn.config import RepetitionDetection
from persyn.errors import shorten
from persyn.llm.chat import PLAIN_STOP, Chat
from persyn.llm.protocols import Failed, Generate, Generated, Sampling

#: vLLM's finish reason for a response that repeats itself. The response is incomplete.
REPETITION = "repetition"


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
        ids = chat.prompt_ids(request.messages)
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
    """The result with its text stripped; fails as `empty` if nothing is left, as `repetition` if it repeats itself.

    NUL characters, which PostgreSQL cannot store, are replaced.
    """
    if generated.finish_reason == REPETITION:
        return Failed(generated.id, f"repetition: the response repeats itself{_after(generated.response_tokens)}")
    text = generated.text.replace("\0", "\N{REPLACEMENT CHARACTER}").strip()
    if not text:
        return Failed(generated.id, f"empty: no text, finish reason {generated.finish_reason or 'unknown'}")
    return Generated(
        id=generated.id,
        text=text,
        finish_reason=generated.finish_reason,
        prompt_tokens=generated.prompt_tokens,
        response_tokens=generated.response_tokens,
        seconds=generated.seconds,
    )


def _after(tokens: int | None) -> str:
    return "" if tokens is None else f" after {tokens:,} tokens"


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


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one."""
    found = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
