"""Interpret the errors of a chat completions server: what caused one, and whether to retry.

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

#: Upper limit for a pause requested by a server.
_LONGEST_PAUSE_SECONDS = 300.0
#: Messages for a prompt that does not fit: OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic, Gemini, DashScope.
_TOO_LONG = re.compile(
    r"context.?(length|size|window|limit)|maximum (model|context)|max_model_len|too (long|many tokens)"
    r"|(prompt|input|message|request|payload|entity|content|body)\w*\b.{0,60}too large"
    r"|(prompt|input)\w*\b.{0,40}(exceed|must have less than)"
    r"|exceed\w*\b.{0,30}token limit|token limit.{0,20}exceed|tokens?( count)? exceed"
    r"|`inputs` tokens|reduce the length|input token count|range of input length|超长|长度超",
    re.IGNORECASE,
)
#: The same messages are used for an option that is too high, which a shorter prompt would not fix.
MAX_TOKENS = re.compile(r"max[_ ]?((completion|output|new)[_ ]?)?tokens", re.IGNORECASE)
_OF_THE_PROMPT = re.compile(r"\b(prompts?|inputs?|messages?)\b|\byou requested|tokens requested", re.IGNORECASE)
_OPTION_AND_CONTEXT = re.compile(r"max\w*tokens\W+is too large: (\d{1,9})\b.*context length is (\d{1,9})\b")
#: A single request with more tokens than the account may use in a minute, which OpenAI rejects with HTTP 429.
_BEYOND_LIMIT = re.compile(r"request too large\b", re.IGNORECASE)
#: An account without credit or blocked: OpenAI, OpenRouter, Anthropic, DeepSeek, Moonshot, Zhipu, DashScope.
_NO_CREDIT = re.compile(
    r"insufficient[ _-](quota|balance|credit|fund)|credit balance|(out of|not enough|no more|more) credits?\b"
    r"|(credits?|balance|funds?) (\w+ ){0,2}(insufficient|exhausted|depleted|used up|too low|expired)"
    r"|billing[ _](hard[ _])?limit|billing_not_active|exceeded_current_quota|spend(ing)? (limit|cap)|payment required"
    r"|hard limit|key limit exceeded|trial (\w+ )?(ended|expired)|arrear|欠费|余额不足"
    r"|account\b.{0,40}\b(suspended|deactivated|disabled|inactive)",
    re.IGNORECASE,
)
#: Gemini also uses the first for a per-minute limit, and then states when to retry.
_QUOTA = re.compile(r"exceeded your current quota|quota (\w+ )?(exhausted|used up)", re.IGNORECASE)
_LATER = re.compile(r"retry|try again|per[ _](second|minute|hour|day)", re.IGNORECASE)
#: Errors of the key or the model despite HTTP 400 (Gemini, DeepSeek, OpenRouter, LiteLLM) or 200.
_ACCESS = re.compile(
    r"\bapi[ _-]?keys?\b|authenticat|unauthori[sz]ed|permission|invalid model|not a valid model"
    r"|\bmodels?\b.{0,60}not (exist|found)",
    re.IGNORECASE,
)
_ACCESS_CODE = re.compile(r"invalid_api_key|authentication|unauthori[sz]ed|unauthenticated|permission", re.IGNORECASE)
#: Codes and finish reasons of filters that refuse a prompt or a response.
REFUSED = re.compile(
    r"filter|safety|unsafe|sensitive|recitation|block|prohibited|\bspii\b|refus|guardrail|moderat|flagged|toxic"
    r"|harmful|violat|content_policy|data_inspection",
    re.IGNORECASE,
)
#: Words for refusals that are not about the content of a prompt or a response.
_NOT_CONTENT = re.compile(
    r"account|conn|key|\bip|user|service|network|address|billing|rate|project|permission", re.IGNORECASE
)

Blame: TypeAlias = Literal["prompt", "request", "access", "account"]
"""The cause of a refusal.

prompt:  certainly the prompt.
request: the prompt, unless every request is refused: then the form of the run's requests.
access:  the key, address or model, unless other requests are answered: then the prompt.
account: certainly the account.
"""


class RetryableError(Exception):
    """A retry may succeed.

    is_absent:     the connection was not accepted.
    is_late:       the answer took too long.
    pause_seconds: the pause requested by the server.
    status:        the HTTP status, or the one given in the answer; None without one.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_absent: bool = False,
        is_late: bool = False,
        pause_seconds: float = 0.0,
        status: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.is_absent = is_absent
        self.is_late = is_late
        self.pause_seconds = pause_seconds
        self.status = status

    @property
    def may_be_charged(self) -> bool:
        """Whether the server may have computed an answer: it was late, broke off, or is unusable."""
        return not self.is_absent and self.status is None


class RefusedError(Exception):
    """The server will never answer this request; the message is the reason of the failure.

    tokens: of the prompt and of an answer that was computed all the same, None where they were not counted; None if
            nothing was computed.
    """

    def __init__(
        self, reason: str, *, blame: Blame = "prompt", tokens: tuple[int | None, int | None] | None = None
    ) -> None:
        super().__init__(reason)
        self.blame = blame
        self.tokens = tokens


class Complaint(NamedTuple):
    """A server's error message.

    said:   its text, on one line of bounded length.
    codes:  its machine-readable words and numbers.
    status: an HTTP status among the codes, which some servers give in place of the real one.
    """

    said: str
    codes: frozenset[str]
    status: int | None


def complaint(body: Any) -> Complaint:
    """Extract the error from an answer: OpenAI's {"error": {"message": ...}} and variants, or the text itself.

    body: the decoded JSON, or the text of an answer that is not JSON.
    """
    codes = frozenset(_codes(body))
    status = next((int(code) for code in sorted(codes) if re.fullmatch(r"[45]\d\d", code)), None)
    return Complaint(shorten(_words(body)) or "nothing", codes, status)


def says(error: Any) -> bool:
    """Whether an answer's `error` has content: some servers send one with null fields in every response."""
    return any(map(says, error.values())) if isinstance(error, dict) else bool(error)


def is_complaint(body: Mapping[str, Any]) -> bool:
    """Whether a piece of a stream without choices is an error: vLLM's, FastAPI's, ..."""
    is_named = "error" in (body.get("object"), body.get("type"))
    return is_named or any(isinstance(body.get(field), str) and body[field] for field in _WORDS)


#: The fields with error messages; if there are several, as in {"error": "Bad Request", "message": ...}, all are kept.
_WORDS = ("error", "message", "detail", "msg", "error_message", "error_msg", "error_description", "status_msg")


def _words(said: Any) -> str:
    if isinstance(said, list) and len(said) == 1:  # Gemini
        said = said[0]
    return _said(said)


def _said(said: Any) -> str:
    if isinstance(said, str):
        return said
    if isinstance(said, dict):
        fields = [said[field] for field in (*_WORDS, "base_resp") if isinstance(said.get(field), str | list | dict)]
        if words := ": ".join(dict.fromkeys(_said(field) for field in fields if field)):
            return words + _raw(said)
    return msgspec.json.encode(said).decode()


def _raw(said: Mapping[str, Any]) -> str:
    """The upstream server's message, as passed on by OpenRouter."""
    metadata = said.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return f" ({raw})" if isinstance(raw, str) else ""


def _codes(said: Any) -> Iterator[str]:
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if isinstance(said, dict):
        yield from (str(said[field]).lower() for field in _CODES if said.get(field))
        yield from _codes(said.get("error"))
        yield from _codes(said.get("base_resp"))


_CODES = ("code", "type", "status", "statusCode", "status_code", "error_code", "errorCode", "error_type")


def trouble(status: int, headers: Mapping[str, str], found: Complaint) -> RetryableError | RefusedError:
    """Classify an error response.

    status: the HTTP status, or the one given in the answer.
    """
    said = f"HTTP {status}: {found.said}"
    lacks_credit = _lacks_credit(found, headers)
    # The words alone may quote the prompt, as some servers do; another request then shows the cause.
    is_sure = lacks_credit and (_is_of_server(status) or _has_no_credit_code(found))
    if status in {401, 402, 405, 407, 498} or 300 <= status < 400 or is_sure:
        return RefusedError(said, blame="account")
    if status == 429 and _BEYOND_LIMIT.search(found.said):
        return RefusedError(f"too_long: {found.said}")
    if _is_of_server(status):
        return RetryableError(said, pause_seconds=_retry_after(headers), status=status)
    if status in {400, 413, 422} and is_too_long(found):
        return RefusedError(f"too_long: {found.said}")
    if _is_of_filter(found):
        return RefusedError(f"refused: {said}")
    is_about_it = status in {400, 413, 414, 422, 431, 451} and not (lacks_credit or _is_of_access(found))
    return RefusedError(f"refused: {said}", blame="request" if is_about_it else "access")


def in_answer(body: Any, headers: Mapping[str, str]) -> RetryableError | RefusedError:
    """Classify an answer with HTTP 200 that contains an error, or is not a chat completion."""
    found = complaint(body)
    said = f"no chat completion in the answer: {found.said}"
    again = RetryableError(said, pause_seconds=_retry_after(headers), status=found.status)
    if isinstance(body, str) or _is_response(body):  # a page or a partial response, whose text is not an error message
        return again
    if is_too_long(found) and not _is_of_server(found.status):
        return RefusedError(f"too_long: {found.said}")
    if _is_of_filter(found):
        return RefusedError(f"refused: {found.said}")
    if found.status in {401, 402, 403, 404} or _lacks_credit(found, headers):
        return trouble(found.status or 403, headers, found)
    if any(map(_ACCESS_CODE.search, found.codes)):
        return RefusedError(f"refused: {found.said}", blame="access")
    return again


def _is_response(body: Any) -> bool:
    return isinstance(body, dict) and bool(body.get("choices")) and not any(map(body.get, _WORDS))


def _is_of_server(status: int | None) -> bool:
    """Whether a status means that the server may answer later."""
    return status is not None and (status in {408, 409, 420, 421, 423, 424, 425, 429, 499} or status >= 500)


def _is_of_filter(found: Complaint) -> bool:
    return any(REFUSED.search(code) and not _NOT_CONTENT.search(code) for code in found.codes)


def _is_of_access(found: Complaint) -> bool:
    return bool(_ACCESS.search(" ".join([found.said, *found.codes])))


def is_too_long(found: Complaint) -> bool:
    """Whether an error is about a prompt that does not fit the model's context."""
    if "context_length_exceeded" in found.codes:
        return True
    is_about_option = MAX_TOKENS.search(found.said) and not _OF_THE_PROMPT.search(found.said)
    return bool(_TOO_LONG.search(found.said)) and not is_about_option and not _is_beyond_any_prompt(found.said)


def _is_beyond_any_prompt(said: str) -> bool:
    """Whether the option alone exceeds the whole context, in vLLM's wording."""
    found = _OPTION_AND_CONTEXT.search(said)
    return found is not None and int(found[1]) >= int(found[2])


def _has_no_credit_code(found: Complaint) -> bool:
    return any(map(_NO_CREDIT.search, found.codes))


def _lacks_credit(found: Complaint, headers: Mapping[str, str]) -> bool:
    if _NO_CREDIT.search(" ".join([found.said, *found.codes])):
        return True
    comes_again = "Retry-After" in headers or _LATER.search(found.said)
    return bool(_QUOTA.search(found.said)) and not comes_again


def _retry_after(headers: Mapping[str, str]) -> float:
    """The delay that the server requests, in seconds or as a date; 0 if it requests none."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE_SECONDS) if seconds == seconds else 0.0
