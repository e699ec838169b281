"""Score quality by running the tests in a prompt's row against the code in the response, in a sandbox.

See `persyn.llm.sandbox` for the walls, and `code_tests` for the fields and the code.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import msgspec

from persyn.errors import shorten
from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Request, Result, Tick
from persyn.llm.sandbox import box
from persyn.llm.sandbox.box import CannotTest, Limits, Tests
from persyn.llm.scorers import code_tests, text_only
from persyn.llm.scorers.code_tests import Example

#: Responses taken at once, for each that is tested at the same time.
_CHUNK = 16
#: Failed tests that a score's detail names.
_MOST_NAMED = 3
#: Scripts that are not done in time before the remaining tests count as failed.
_MOST_LATE = 3
#: Timeouts of one test that all tests of a response may take together, unless the options say otherwise.
_TIMEOUTS = 10


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Make a runner of tests that answers `Judge`; `detail` says which tests failed and why.

    A prompt whose tests cannot be run fails as `no_tests`, `malformed_tests`, `unreadable_tests` or
    `unsupported_tests`. `ModelSpec.model` is not used. Raises `HostLacks` where the sandbox does not hold.
    """
    chosen = options.decode(spec, options.CodeOptions)
    box.require_walls(_limits(chosen))
    workers = chosen.concurrency or len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tests")

    def compute(requests: Sequence[Request]) -> Iterator[list[Result]]:
        running = {pool.submit(_judge, request, chosen) for request in requests}
        while running:
            done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            tick()
            if done:
                yield [future.result() for future in done]

    return Batched(compute, version=f"python {platform.python_version()}", chunk=_CHUNK * workers)


def lacks(chosen: Mapping[str, Any]) -> str:
    """Why code cannot be tested on this host; empty if it can.

    chosen: the options.
    """
    limits = _limits(msgspec.convert(chosen, options.CodeOptions))
    missing = box.missing_walls(limits.memory_mb)
    lacking = [wall for wall in missing if wall not in limits.without]
    return box.describe(lacking, missing) if lacking else ""


def _limits(chosen: options.CodeOptions) -> Limits:
    return Limits(
        timeout_seconds=chosen.timeout_seconds,
        total_seconds=chosen.total_seconds or _TIMEOUTS * chosen.timeout_seconds,
        memory_mb=chosen.memory_mb,
        without=tuple(chosen.unsafe_without),
    )


def _judge(request: Request, chosen: options.CodeOptions) -> Result:
    assert isinstance(request, Judge)
    if failure := text_only.refusal(request):
        return failure
    try:
        tests = code_tests.tests_of(request.meta, request.messages[-1]["content"] if request.messages else "")
        code = code_tests.code_of(request.response)
        if code is None:
            return Judged(request.id, 0.0, detail={"failed": [{"reason": "the response has no block of Python code"}]})
        limits, stop_early = _limits(chosen), chosen.level == "prompt"
        if isinstance(tests, Tests):
            named = tests.tests if isinstance(tests.tests, list) else []
            failures = box.run_tests(code, tests, limits, stop_early=stop_early)
        else:
            named = [f"input {example.input!r}" for example in tests]
            failures = _run_examples(code, tests, limits, stop_early=stop_early)
    except CannotTest as error:
        return Failed(request.id, str(error))
    return _score(request.id, failures, named, chosen)


def _score(
    request_id: int, failures: Sequence[str | None], named: Sequence[str], chosen: options.CodeOptions
) -> Judged:
    passed = failures.count(None)
    value = passed / len(failures) if chosen.level == "test" else float(passed == len(failures))
    failed = [
        {"test": shorten(named[index]) if index < len(named) else f"test {index + 1}", "reason": shorten(reason)}
        for index, reason in enumerate(failures)
        if reason is not None
    ]
    return Judged(request_id, value, detail={"tests": len(failures), "passed": passed, "failed": failed[:_MOST_NAMED]})


def _run_examples(code: str, examples: Sequence[Example], limits: Limits, *, stop_early: bool) -> list[str | None]:
    """Run a script once per example; the failure of each, None if its output is the expected one."""
    failures: list[str | None] = []
    deadline = time.monotonic() + limits.total_seconds
    for example in examples:
        if (left := deadline - time.monotonic()) <= 0:
            return failures + [box.OVER] * (len(examples) - len(failures))
        limits = replace(limits, timeout_seconds=min(limits.timeout_seconds, left))
        output, failure = box.run_program(code, _text(example.input), limits)
        expected = _text(example.output)
        if not failure and _lines(output) != _lines(expected):
            failure = f"output {shorten(repr(output), most=80)}, expected {shorten(repr(expected), most=80)}"
        failures.append(failure or None)
        if (stop_early and failure) or failures.count(box.LATE) == _MOST_LATE:
            break
    return failures + ["not run"] * (len(examples) - len(failures))


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "\n".join(lines)


def _lines(text: str) -> list[str]:
    """The lines of an output without trailing white space and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
