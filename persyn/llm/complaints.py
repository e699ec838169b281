"""What a server of chat completions says when it gives no response: whose fault it is, and what becomes of it.

Servers agree on little: an error may come with HTTP 200, a moderated prompt as 403 or 404, an empty account as 429.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from persyn.errors import shorten

#: A server that asks for more patience than this gets asked again anyway.
_LONGEST_PAUSE_SECONDS = 300.0
#: What servers say of a prompt that does not fit: OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic, Gemini, DashScope.
_TOO_LONG = re.compile(
    r"context.?(length|size|window|limit)|maximum (model|context)|max_model_len|too (long|large|many tokens)"
    r"|`inputs` tokens|reduce the length|input token count|range of input length",
    re.IGNORECASE,
)
#: They say the same of an option that is set too high, which no shorter prompt would mend.
_MAX_TOKENS = re.compile(r"max_?((completion|output|new)_?)?tokens", re.IGNORECASE)
_OF_THE_PROMPT = re.compile(r"\b(prompts?|inputs?|messages?)\b|requested", re.IGNORECASE)
#: An account that has to be paid for or unlocked: OpenAI, OpenRouter, Anthropic, DeepSeek, Moonshot, Zhipu, DashScope.
_NO_CREDIT = re.compile(
    r"insufficient[ _-](quota|balance|credit|fund)|credit balance|(out of|not enough|no more|more) credits?\b"
    r"|billing[ _](hard[ _])?limit|billing_not_active|exceeded_current_quota|spending limit|arrear|欠费|余额不足"
    r"|account\b.{0,40}\b(suspended|deactivated|disabled|inactive)",
    re.IGNORECASE,
)
#: Gemini says the first of a limit per minute too, and then when to come again.
_QUOTA, _LATER = (re.compile(words, re.IGNORECASE) for words in (r"exceeded your current quota", r"retry|try again"))
#: What a filter that refuses a prompt or a response goes by, as a code or as a finish reason.
REFUSED = re.compile(
    r"filter|safety|sensitive|recitation|block|prohibited|\bspii\b|refus|guardrail|moderat|flagged|toxic"
    r"|content_policy|data_inspection",
    re.IGNORECASE,
)

Blame: TypeAlias = Literal["prompt", "request", "access", "account"]
"""Whose fault a refusal is.

prompt:  the prompt's, for sure.
request: the prompt's, unless every request is refused: then it is how the run asks.
access:  the key's, the address' or the model's, unless other requests are answered: then it is the prompt's.
account: the account's, for sure.
"""


class RetryableError(Exception):
    """The server may answer when it is asked again.

    is_absent:     nothing took the connection.
    pause_seconds: what the server asks to be left alone for.
    """

    def __init__(self, reason: str, *, is_absent: bool = False, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.is_absent = is_absent
        self.pause_seconds = pause_seconds


class RefusedError(Exception):
    """The server will not answer this request however often it is asked; the message is the reason of the failure."""

    def __init__(self, reason: str, *, blame: Blame = "prompt") -> None:
        super().__init__(reason)
        self.blame = blame


class Complaint(NamedTuple):
    """What a server says is wrong.

    said:   its words, on one line of bounded length.
    codes:  the words and numbers for programs among them.
    status: an HTTP status among those, which some servers give in place of the answer's own.
    """

    said: str
    codes: frozenset[str]
    status: int | None


def complaint(body: Any) -> Complaint:
    """What an answer complains of: OpenAI's {"error": {"message": ...}} in its variants, or the text as it is.

    body: the decoded JSON, or the text of an answer that is none.
    """
    codes = frozenset(_codes(body))
    status = next((int(code) for code in sorted(codes) if re.fullmatch(r"[45]\d\d", code)), None)
    return Complaint(shorten(_words(body)) or "nothing", codes, status)


def _words(said: Any) -> str:
    if isinstance(said, list) and len(said) == 1:  # Gemini's
        said = said[0]
    raw = ""
    for field in ("error", "message", "detail", "msg"):
        if isinstance(said, dict) and said.get(field):
            raw = raw or _raw(said)
            said = said[field]
    return (said if isinstance(said, str) else msgspec.json.encode(said).decode()) + raw


def _raw(said: Mapping[str, Any]) -> str:
    """What the server behind a router of servers said, as OpenRouter passes it on."""
    metadata = said.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return f" ({raw})" if isinstance(raw, str) else ""


def _codes(said: Any) -> Iterator[str]:
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if isinstance(said, dict):
        yield from (str(said[field]).lower() for field in ("code", "type", "status") if said.get(field))
        yield from _codes(said.get("error"))


def trouble(status: int, headers: Mapping[str, str], found: Complaint) -> RetryableError | RefusedError:
    """What becomes of a request that was answered by an error.

    status: HTTP's, or the one that the answer itself names.
    """
    said = f"HTTP {status}: {found.said}"
    if status in {401, 402, 405, 407, 498} or 300 <= status < 400 or _lacks_credit(found, headers):
        return RefusedError(said, blame="account")
    if status in {408, 409, 421, 423, 425, 429, 499} or status >= 500:
        return RetryableError(said, pause_seconds=_retry_after(headers))
    if status in {400, 413, 422} and is_too_long(found):
        return RefusedError(f"too_long: {found.said}")
    if any(REFUSED.search(code) for code in found.codes):
        return RefusedError(f"refused: {said}")
    is_about_it = status in {400, 413, 414, 422, 431, 451}
    return RefusedError(f"refused: {said}", blame="request" if is_about_it else "access")


def in_answer(body: Any, headers: Mapping[str, str]) -> RetryableError | RefusedError:
    """What becomes of a request that was answered with HTTP 200 and an error, or with what is no chat completion."""
    found = complaint(body)
    again = RetryableError(f"no chat completion in the answer: {found.said}", pause_seconds=_retry_after(headers))
    if isinstance(body, str):  # a page, or the beginning of a response: whatever it says is no complaint
        return again
    if is_too_long(found):
        return RefusedError(f"too_long: {found.said}")
    if any(REFUSED.search(code) for code in found.codes):
        return RefusedError(f"refused: {found.said}")
    if found.status in {401, 402, 403, 404} or _lacks_credit(found, headers):
        return trouble(found.status or 402, headers, found)
    return again


def is_too_long(found: Complaint) -> bool:
    """Whether a complaint is about a prompt that does not fit the model's context."""
    if "context_length_exceeded" in found.codes:
        return True
    is_about_option = _MAX_TOKENS.search(found.said) and not _OF_THE_PROMPT.search(found.said)
    return bool(_TOO_LONG.search(found.said)) and not is_about_option


def _lacks_credit(found: Complaint, headers: Mapping[str, str]) -> bool:
    if _NO_CREDIT.search(" ".join([found.said, *found.codes])):
        return True
    comes_again = "Retry-After" in headers or _LATER.search(found.said)
    return bool(_QUOTA.search(found.said)) and not comes_again


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
    return min(max(seconds, 0.0), _LONGEST_PAUSE_SECONDS) if seconds == seconds else 0.0
