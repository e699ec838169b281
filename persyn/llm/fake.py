"""An engine without a model that answers every kind of request, for tests and benchmarks.

Its answers depend on the request alone: they are the same in every process and for every batching.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec

from persyn.errors import EngineError
from persyn.llm import options, tools
from persyn.llm.protocols import (
    Check,
    Checked,
    Engine,
    Failed,
    Finding,
    Fit,
    Fitted,
    Generate,
    Generated,
    Judge,
    Judged,
    Message,
    ModelSpec,
    Request,
    Result,
    Route,
    Routed,
    Tick,
)
from persyn.llm.teachers import results

_SYLLABLES = ["ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va"]
#: One for each value of a byte.
_WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]

_MOMENT_SECONDS = 0.2
_encode = msgspec.msgpack.Encoder().encode
_encode_json = msgspec.json.Encoder().encode


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Make an engine that answers every request; `EngineError` if its journal is not writable.

    Options: `options.FakeOptions`.
    """
    chosen = options.decode(spec, options.FakeOptions)
    ready_at = time.monotonic() + chosen.load_seconds
    while (left := ready_at - time.monotonic()) > 0:
        time.sleep(min(left, _MOMENT_SECONDS))
        tick()
    return FakeEngine(spec.model, chosen)


def _opened(journal: str) -> BinaryIO:
    try:
        return open(journal, "ab", buffering=0)
    except OSError as error:
        raise EngineError(f"the journal {journal} cannot be written: {error.strerror}") from error


class FakeEngine:
    """Answers requests in order of arrival, after a latency and at a limited rate."""

    version = "fake 1"

    def __init__(self, model: str, chosen: options.FakeOptions) -> None:
        self.window = 2 * chosen.concurrency
        self._model = model
        self._options = chosen
        self._watches = chosen.crash_on is not None or chosen.hang_on is not None
        self._journal = _opened(chosen.journal) if chosen.journal else None
        self._waiting: deque[Request] = deque()
        self._in_flight: deque[tuple[float, Request]] = deque()
        self._turn_seconds = 1 / chosen.rows_per_second if chosen.rows_per_second else 0.0
        self._last_due = 0.0

    @property
    def pending(self) -> int:
        """The number of submitted and unfinished requests."""
        return len(self._waiting) + len(self._in_flight)

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests."""
        self._waiting.extend(requests)

    def step(self) -> list[Result]:
        """Admit requests up to the concurrency and answer those that are due; waits a moment when none is."""
        now = time.monotonic()
        self._admit(now)
        if self._in_flight and (left := self._in_flight[0][0] - now) > 0:
            time.sleep(min(left, _MOMENT_SECONDS))
            now = time.monotonic()
        results: list[Result] = []
        while self._in_flight and self._in_flight[0][0] <= now:
            results.append(self._answer(self._in_flight.popleft()[1]))
        return results

    def _admit(self, now: float) -> None:
        for _ in range(min(len(self._waiting), self._options.concurrency - len(self._in_flight))):
            request = self._waiting.popleft()
            if self._watches and not isinstance(request, Fit | Check):
                self._watch(request.messages)
            if self._journal is not None and not isinstance(request, Fit | Check):
                self._journal.write(_encode_json([self._model, request.messages[-1]["content"]]) + b"\n")
            self._last_due = max(now + self._options.latency_seconds, max(now, self._last_due) + self._turn_seconds)
            self._in_flight.append((self._last_due, request))

    def _watch(self, messages: Sequence[Message]) -> None:
        prompt = "\n".join(message["content"] for message in messages)
        if self._options.crash_on is not None and self._options.crash_on in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._options.hang_on is not None and self._options.hang_on in prompt:
            _hang()

    def _answer(self, request: Request) -> Result:
        if isinstance(request, Check):
            return Checked(request.id, [Finding("ok", "load", "a fake engine has no model to check")])
        digest = self._digest(request)
        number = int.from_bytes(digest[-8:], "big")
        if self._options.fail_every and number % self._options.fail_every == 0:
            return Failed(request.id, f"refused: one of {self._options.fail_every} requests")
        if isinstance(request, Generate):
            return self._generated(request, digest)
        if isinstance(request, Judge):
            n_tokens = len(_said(request).split())
            return Judged(
                request.id, _unit(digest), n_tokens, statistics={"answer": self._statistics(digest, n_tokens)}
            )
        if isinstance(request, Route):
            return self._routed(request, digest)
        return _fitted(request, digest)

    def _statistics(self, digest: bytes, n_tokens: int) -> dict[str, float]:
        """Those of a student, without meaning."""
        from persyn.method import learnability  # other hosts need no NumPy

        extra = [name for name in learnability.EXTRA if name in self._options.statistics]
        names = ("squares", "lowest", "lowest_window", "rank", "n_first", "entropy", *extra)
        drawn = {name: _unit(hashlib.blake2b(digest, key=name.encode()).digest()) for name in names}
        return drawn | {"n_lowest": float(n_tokens)}

    def _digest(self, request: Generate | Judge | Route | Fit) -> bytes:
        """32 bytes derived from everything in the request that may affect the answer."""
        if isinstance(request, Generate):
            content: tuple[object, ...] = (self._model, request.messages, request.seed)
            content += (request.tools,) if request.tools else ()
            content += (request.adapter,) if request.adapter else ()
        elif isinstance(request, Judge):
            content = (self._model, request.messages, request.response, request.answer)
            content += (request.tool_calls,) if request.tool_calls else ()
        elif isinstance(request, Route):
            content = (self._model, request.messages)
        else:
            content = (self._model, request.conversations, request.rewards, request.teachers, request.seed)
        return hashlib.blake2b(_encode(content), digest_size=32).digest()

    def _generated(self, request: Generate, digest: bytes) -> Generated | Failed:
        if request.schema:
            text = _encode_json(_conforming(request.schema, digest)).decode()
            return Generated(request.id, text, "stop", None, None, self._options.latency_seconds)
        every = self._options.call_every
        if request.tools and every and digest[0] % every == 0:
            return self._call(request, request.tools[0]["function"], digest)
        sampling, n_reasoning = request.sampling, self._options.reasoning_words
        if sampling.max_reasoning_tokens is not None:
            n_reasoning = min(n_reasoning, sampling.max_reasoning_tokens)
        wanted = n_reasoning + self._options.response_words
        count = min(wanted, sampling.max_tokens)
        n_reasoning = min(n_reasoning, count)
        # The answer comes first, so that it is the same with and without reasoning.
        words = [_WORDS[byte] for byte in (digest * (wanted // len(digest) + 1))[:wanted]]
        answer, reasoning = words[: count - n_reasoning], words[self._options.response_words :][:n_reasoning]
        return results.to_result(
            Generated(
                id=request.id,
                text=" ".join(answer),
                finish_reason="stop" if count == wanted else "length",
                prompt_tokens=sum(message["content"].count(" ") + 1 for message in request.messages),
                response_tokens=count,
                seconds=self._options.latency_seconds,
                reasoning=" ".join(reasoning) or None,
                reasoning_tokens=n_reasoning,
            )
        )

    def _call(self, request: Generate, function: dict[str, Any], digest: bytes) -> Generated:
        """A call of a function, with arguments that conform to its parameters."""
        arguments = _encode_json(_conforming(function.get("parameters", {}), digest)).decode()
        calls = tools.read_calls([{"id": f"call_{digest.hex()[:8]}", "name": function["name"], "arguments": arguments}])
        seconds = self._options.latency_seconds
        return Generated(request.id, "", "tool_calls", None, None, seconds, tool_calls=calls)

    def _routed(self, request: Route, digest: bytes) -> Routed | Failed:
        if not self._options.teachers:
            return Failed(request.id, "bad_request: a fake router needs the option 'teachers'")
        scores = [_unit(hashlib.blake2b(digest, salt=b"%d" % k).digest()) for k in range(self._options.teachers)]
        return Routed(request.id, scores)


def _said(request: Judge) -> str:
    return tools.written({"content": request.response, "tool_calls": request.tool_calls})


def _conforming(schema: Any, digest: bytes) -> Any:
    """A value that conforms to a schema of types, properties, items, constants and enumerations."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][digest[0] % len(schema["enum"])]
    kind = schema.get("type", "object")
    return _of_kind(kind if isinstance(kind, str) else kind[0], schema, digest)


def _of_kind(kind: str, schema: dict[str, Any], digest: bytes) -> Any:
    match kind:
        case "object":
            return {name: _conforming(part, digest) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [_conforming(schema["items"], digest)] if "items" in schema else []
        case "string":
            return _WORDS[digest[0]]
        case "integer" | "number":
            return digest[0]
        case "boolean":
            return digest[0] % 2 == 0
    return None


def _fitted(request: Fit, digest: bytes) -> Fitted:
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _encode({"teachers": request.teachers, "seed": request.seed, "digest": digest})
    (folder / "router.msgpack").write_bytes(checkpoint)
    n_holdout = sum(request.is_holdout)
    metrics = {"kind": "fake", "n_calibration": len(request.is_holdout) - n_holdout, "n_holdout": n_holdout}
    scores = [
        [_unit(hashlib.blake2b(digest, salt=b"%d.%d" % (p, k)).digest()) for k in range(len(request.teachers))]
        for p in range(len(request.conversations))
    ]
    # It learned nothing from any prompt.
    cross_fitted = [None if held else row for held, row in zip(request.is_holdout, scores, strict=True)]
    sha256 = hashlib.sha256(checkpoint).hexdigest()
    return Fitted(request.id, request.folder, sha256, metrics, scores, cross_fitted)


def _unit(digest: bytes) -> float:
    """A number in [0, 1) from 53 bits, a float's precision."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)
