"""What crosses to and from a server of chat completions: a request's body, its answer, its complaints.

Knows JSON and HTTP's status codes; opens no connection.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from persyn.errors import shorten
from persyn.llm import generation
from persyn.llm.protocols import Generate, Generated, Result

#: A server that asks for more patience than this gets asked again anyway.
_LONGEST_PAUSE_SECONDS = 300.0
#: What servers say of a prompt that does not fit: OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic.
_TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum (model|context)|max_model_len|too (long|large|many tokens)"
    r"|`inputs` tokens|reduce the length",
    re.IGNORECASE,
)


class _Message(Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Completion).decode


class Again(Exception):
    """The server may answer when asked again."""

    def __init__(self, reason: str, *, is_absent: bool = False, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.is_absent = is_absent
        self.pause_seconds = pause_seconds


class Never(Exception):
    """The server will not answer this request; the message is the reason of its failure."""


def body(
    model: str, request: Generate, max_tokens_field: str, extra: Mapping[str, Any], omit: Collection[str]
) -> bytes:
    """The JSON that asks a server for one response; `extra` goes over what follows from the request.

    omit: fields of the request that are left out.
    """
    sampling = request.sampling
    fields: dict[str, Any] = {
        "model": model,
        "messages": request.messages,
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        max_tokens_field: sampling.max_tokens,
    }
    if sampling.stop:
        fields["stop"] = sampling.stop
    if request.schema:
        schema = {"name": "response", "strict": True, "schema": request.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    # Not OpenAI's own: sent only where a run asks for it.
    if sampling.top_k:
        fields["top_k"] = sampling.top_k
    if sampling.repetition_penalty != 1.0:
        fields["repetition_penalty"] = sampling.repetition_penalty
    asked = {name: value for name, value in fields.items() if name not in omit}
    return _encode(asked | dict(extra))


def read(request_id: int, answer: bytes, seconds: float) -> Result:
    """The result in a server's answer; `Never` when there is none."""
    try:
        completion = _decode(answer)
        choice = completion.choices[0]
    except (msgspec.DecodeError, IndexError) as error:
        raise Never(f"server_error: no chat completion in the answer: {shorten(str(error))}") from error
    if choice.finish_reason == "content_filter":
        raise Never("refused: content filter")
    if choice.message.refusal:
        raise Never(f"refused: {shorten(choice.message.refusal)}")
    usage = completion.usage or _Usage()
    return generation.conclude(
        Generated(
            id=request_id,
            text=choice.message.content or "",
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            prompt_tokens=usage.prompt_tokens,
            response_tokens=usage.completion_tokens,
            seconds=seconds,
        )
    )


def complaint(content: bytes) -> str:
    """What a server says is wrong: OpenAI's {"error": {"message": ...}} in its variants, or the text as it is."""
    try:
        said: Any = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content.decode(errors="replace")
    for field in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(field):
            said = said[field]
    return said if isinstance(said, str) else msgspec.json.encode(said).decode()


def trouble(status: int, headers: Mapping[str, str], said: str) -> Again | Never:
    """What an HTTP error says about the request; whether it is worth asking again.

    said: the server's complaint, as it may be shown.
    """
    if status in {408, 409, 425, 429} or status >= 500:
        return Again(f"HTTP {status}: {said}", pause_seconds=_retry_after(headers))
    if status in {400, 413, 422} and _TOO_LONG.search(said):
        return Never(f"too_long: {said}")
    return Never(f"refused: HTTP {status}: {said}")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds a server asks for, given as seconds or as a date; 0 when it does not."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE_SECONDS)
