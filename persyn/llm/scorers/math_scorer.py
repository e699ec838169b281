"""Score mathematics: whether a response's final answer equals the reference, by math-verify.

Comparisons run in a child process, `math_child`, that can be killed at any moment.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import msgspec
from msgspec import Struct

from persyn.errors import EngineError
from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Request, Result, Tick
from persyn.llm.scorers import text_only
from persyn.llm.scorers.answers import characters

#: Requests sent to the child at once.
_CHUNK = 64
#: Importing the algebra takes a second or two, and much longer on a busy machine.
_START_SECONDS = 120.0
#: Comparisons after which a child is replaced, because the algebra's caches only grow.
_RECYCLE_AFTER = 20_000
#: Number of characters of a long text examined, from its last mark or up to its end.
_WINDOW = 8_000
_MARK = re.compile(r"\\boxed|\"answer\"|####|<\w*answer|\[answer", re.IGNORECASE)


class Case(Struct, frozen=True):
    """A reference answer and the response to compare with it, both unmodified."""

    gold: str
    response: str


class Verdict(Struct, frozen=True):
    """Whether the two are equal; None if undecided, with the reason."""

    is_right: bool | None
    detail: dict[str, Any] = {}
    failure: str = ""


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Start an answer checker that answers `Judge` with 1.0 (right) or 0.0 (wrong).

    A response that states no answer is wrong, with {"parsed": None} in its detail. What cannot be
    decided fails as `timeout` or `crashed`, a request without a reference as `no_reference_answer`.
    `ModelSpec.model` is not used.
    """
    child = Child(options.decode(spec, options.MathOptions), tick)
    child.start()

    def compute(requests: Sequence[Request]) -> Iterator[list[Result]]:
        failed: list[Result] = []
        waiting: list[Judge] = []
        for request in requests:
            assert isinstance(request, Judge)
            if failure := _refusal(request):
                failed.append(failure)
            else:
                waiting.append(request)
        if failed:
            yield failed
        while waiting:
            results = child.judge(waiting)
            waiting = waiting[len(results) :]
            yield results

    return Batched(compute, version=child.version, chunk=_CHUNK)


def _refusal(request: Judge) -> Failed | None:
    if not (request.answer and request.answer.strip()):
        return Failed(request.id, "no_reference_answer")
    return text_only.refusal(request)


class ChildDied(Exception):
    """The child was did not answer in time or has ended; the message is the reason of a `Failed`."""


class Child:
    """The comparing process, replaced whenever it hangs or dies."""

    def __init__(self, chosen: options.MathOptions, tick: Tick) -> None:
        self.version = ""
        self._options = chosen
        self._tick = tick
        self._served = 0

    def start(self) -> None:
        """Start the process and wait until it is ready; `EngineError` if it does not become ready."""
        here, there = Pipe()
        command = [sys.executable, "-m", "persyn.llm.scorers.math_child", str(there.fileno())]
        command += [str(self._options.timeout_seconds), str(self._options.memory_mb)]
        self._process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        there.close()
        self._pipe: Connection[Any, Any] = here
        self._end = weakref.finalize(self, _end, self._process, here)
        self._served = 0
        try:
            self.version = msgspec.msgpack.decode(self._receive(_START_SECONDS), type=str)
        except ChildDied as error:
            raise EngineError(f"the answer checker cannot be started: {error}") from error

    def judge(self, requests: Sequence[Judge]) -> list[Result]:
        """Results for the first requests: all of them, or up to the one that killed the child."""
        if self._served >= _RECYCLE_AFTER:
            self._end()
            self.start()
        cases = [Case(_window(request.answer or ""), _window(request.response)) for request in requests]
        results: list[Result] = []
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(cases))
            for request in requests:
                reply = self._receive(self._options.timeout_seconds)
                results.append(_result(request.id, msgspec.msgpack.decode(reply, type=Verdict)))
                self._served += 1
        except (ChildDied, BrokenPipeError) as error:
            results.append(Failed(requests[len(results)].id, str(error) or "crashed: the child process is gone"))
            self._end()
            self.start()
        return results

    def _receive(self, seconds: float) -> bytes:
        """The child's next message; `ChildDied` when it takes too long or the child ends."""
        deadline = time.monotonic() + seconds
        try:
            while not self._pipe.poll(min(1.0, max(0.0, deadline - time.monotonic()))):
                self._tick()
                if time.monotonic() >= deadline:
                    raise ChildDied(f"timeout: not decided within {seconds:g} s")
            return self._pipe.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            raise ChildDied(f"crashed: the child process {_how_it_ended(self._process.wait())}") from error


def _end(process: subprocess.Popen[bytes], pipe: Connection[Any, Any]) -> None:
    process.kill()
    process.wait()
    pipe.close()


def _result(request_id: int, verdict: Verdict) -> Result:
    if verdict.is_right is None:
        return Failed(request_id, verdict.failure)
    return Judged(request_id, float(verdict.is_right), detail=verdict.detail)


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _window(text: str) -> str:
    """The part of a long text that may contain its answer; reasoning is removed first."""
    text = characters.without_reasoning(text)
    if len(text) <= _WINDOW:
        return text
    last_mark = max((mark.start() for mark in _MARK.finditer(text)), default=-1)
    start = last_mark if 0 <= last_mark < len(text) - _WINDOW else len(text) - _WINDOW
    return text[start : start + _WINDOW]
