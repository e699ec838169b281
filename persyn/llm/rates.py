"""What requests count for: towards a provider's limits per minute, and towards a run's budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from persyn.config import fingerprint_of
from persyn.llm import options
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import Failed, Generate, Generated, Judge, Judged, ModelSpec, Request, Result

#: Bytes per token of a prompt, as an estimate until the server has counted them.
_BYTES_PER_TOKEN = 4
#: A judge asks for two verdicts.
_VERDICTS = 2
#: At most what chat templates and a judge's rules add to a prompt, in tokens.
_TEMPLATE_TOKENS, _RULES_TOKENS = 64, 1024


class Usage(NamedTuple):
    """Tokens of prompts and of responses."""

    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.response_tokens

    def plus(self, other: Usage, times: int = 1) -> Usage:
        """Together with another usage, once or several times."""
        return Usage(
            self.prompt_tokens + times * other.prompt_tokens, self.response_tokens + times * other.response_tokens
        )


NOTHING = Usage(0, 0)


class Cost(NamedTuple):
    """What one request of a job counts for."""

    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one account at a provider; None where there is none.

    account: the same for all models that share the limits: those with equal URLs, key variable and model name.
    """

    account: str
    requests_per_minute: int | None
    tokens_per_minute: int | None


def limits(spec: ModelSpec) -> Limits | None:
    """The limits of a model's server; None without any, and for batches, which providers limit apart."""
    kind = ENGINES[spec.engine]
    chosen = spec.options.get("options", {}) if kind.is_nested else spec.options
    if kind.reference(spec.options) != "server" or chosen.get("mode") == "batch":
        return None
    per_minute = chosen.get("requests_per_minute"), chosen.get("tokens_per_minute")
    if per_minute == (None, None):
        return None
    urls = chosen.get("base_url")
    place = sorted(urls) if isinstance(urls, list) else [urls]
    return Limits(fingerprint_of([place, chosen.get("api_key_env"), spec.model]), *per_minute)


class Costs:
    """Estimates what the requests for one model count for, from the responses so far."""

    def __init__(self, spec: ModelSpec) -> None:
        self._judge = options.decode(spec, options.JudgeOptions) if ENGINES[spec.engine].is_nested else None
        self._responses, self._response_tokens = 0, 0

    def of(self, request: Request) -> Cost:
        """An estimate: the prompt by its length; the response as long as those so far, at first `max_tokens`."""
        if isinstance(request, Judge) and self._judge is not None:
            prompt = _tokens([request.messages, request.tools, request.response, request.tool_calls, request.answer])
            return Cost(_VERDICTS, _VERDICTS * (prompt + self._judge.max_tokens))
        if isinstance(request, Generate):
            mean = self._response_tokens / self._responses if self._responses else request.sampling.max_tokens
            return Cost(1, _tokens([request.messages, request.tools]) + round(mean))
        return Cost(1, 0)

    def most(self, request: Request) -> Usage:
        """An upper estimate: no token is shorter than a byte, and the response is as long as it may be."""
        if isinstance(request, Judge) and self._judge is not None:
            texts = [request.messages, request.tools, request.response, request.tool_calls, request.answer]
            prompt = _bytes(texts) + _RULES_TOKENS + _bytes([self._judge.criterion])
            return NOTHING.plus(Usage(prompt, self._judge.max_tokens), _VERDICTS)
        if isinstance(request, Generate):
            prompt = _bytes([request.messages, request.tools, request.schema]) + _TEMPLATE_TOKENS
            return Usage(prompt, request.sampling.max_tokens)
        return NOTHING

    def used(self, result: Result) -> int | None:
        """The tokens that the server counted; None if it did not."""
        if not isinstance(result, Generated) or result.prompt_tokens is None or result.response_tokens is None:
            return None
        self._responses += 1
        self._response_tokens += result.response_tokens
        return result.prompt_tokens + result.response_tokens


def usage_of(result: Result) -> Usage | None:
    """The tokens of a result; None where an answer came and nobody counted it."""
    if isinstance(result, Failed):
        return Usage(result.prompt_tokens or 0, result.response_tokens or 0)
    if not isinstance(result, Generated | Judged):
        return NOTHING
    counted = result.prompt_tokens, result.response_tokens
    return None if None in counted else Usage(*counted)  # type: ignore[arg-type]


def _bytes(texts: Sequence[object]) -> int:
    return len(msgspec.json.encode(texts))


def _tokens(texts: Sequence[object]) -> int:
    return _bytes(texts) // _BYTES_PER_TOKEN
