"""Run untrusted code in child processes, each test within its time, and find out whether the walls hold here.

Code with tests has two processes: one for the code, one for the tests. The latter reports the outcomes through a pipe
that the code's process lacks. A script has one process, and who runs it compares its output.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from persyn.errors import EngineError, HostLacks, shorten
from persyn.llm.sandbox.exchange import LENGTH
from persyn.llm.sandbox.walls import NO_WALL, REMEDIES, WALLS

#: A busy machine may take a while to start a process.
_START_SECONDS = 120.0
#: How often the processes of one response are started again because the code did not end in time, or ended itself.
_MOST_STARTS = 3
#: CPU time of a process, in timeouts of one test. The clock ends a test earlier.
_CPU_TIMEOUTS = 100
_OUTPUT_BYTES = 2**20
#: The failure of a test that was ended by the clock.
LATE = "not done in time"
#: The failure of a test that was not begun any more.
OVER = "not run: the time of the response was over"
#: The folder that `persyn` is imported from.
_ROOT = str(Path(__file__).parents[3])


class CannotTest(Exception):
    """The tests of a row cannot be run; the message is the reason of a `Failed`."""


class _Verdict(Struct, frozen=True):
    """A message of the process with the tests; it has one of these fields.

    tests:    their number; the failure of each follows.
    failure:  of a test; None if it passed.
    no_start: the process of the code has ended before it loaded the code.
    """

    tests: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    failure: str | UnsetType | None = UNSET
    unreadable_tests: str | None = None
    unsupported_tests: str | None = None
    no_start: bool = False

    @property
    def refusal(self) -> str:
        """Why the tests cannot be run; empty if they can."""
        for name in ("unreadable_tests", "unsupported_tests"):
            if (said := getattr(self, name)) is not None:
                return f"{name}: {shorten(said)}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one test may use.

    timeout_seconds: by the clock.
    total_seconds:   all tests of a response together, with the start of their processes.
    memory_mb:       address space of each process in MiB.
    without:         walls that may be missing.
    """

    timeout_seconds: float
    memory_mb: int
    total_seconds: float = math.inf
    without: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """Tests of code that it cannot see.

    preamble:    statements that run before the code; the tests see what they define and import as it is there, whatever
                 the code makes of the names. Only its classes are the code's.
    setup:       statements that run before the tests.
    tests:       one statement or more per test; or one text that defines `check(candidate)` or functions `test_...`, or
                 is one test.
    entry_point: the function that `check` gets.
    """

    preamble: str = ""
    setup: str = ""
    tests: list[str] | str
    entry_point: str | None = None


def run_tests(code: str, tests: Tests, limits: Limits, *, stop_early: bool) -> list[str | None]:
    """Run tests against code; the failure of each, None if it passed.

    stop_early: tests after the first failed one do not matter.
    Raises `CannotTest`, and `EngineError` if the sandbox does not work here.
    """
    total, failures = 1, list[str | None]()
    deadline = time.monotonic() + limits.total_seconds
    for _ in range(_MOST_STARTS):
        with closing(_verdicts(code, tests, len(failures), limits, deadline)) as verdicts:
            for said in verdicts:
                total = said.tests or total
                if said.refusal:
                    raise CannotTest(said.refusal)
                if said.failure is not UNSET:
                    failures.append(said.failure)
                if stop_early and failures and failures[-1]:
                    return failures + ["not run: another test failed"] * (total - len(failures))
        if len(failures) >= total or time.monotonic() > deadline:
            return failures + [OVER] * (total - len(failures))
    return failures + [f"not run: the code was ended {_MOST_STARTS} times"] * (total - len(failures))


def run_program(code: str, given: str, limits: Limits) -> tuple[str, str]:
    """Run a script with a text on its standard input; return its output, and why it failed, empty if it did not.

    Raises `EngineError` if the sandbox does not work here.
    """
    cpu_seconds = math.ceil(limits.timeout_seconds) + 1
    with _Children(limits) as children, _file(given.encode(errors="replace")) as standard_input:
        job = {"role": "program", "code": code, "cpu_seconds": cpu_seconds}
        process = children.start(job, stdin=standard_input, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        assert process.stderr
        pipes = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        deadline = time.monotonic() + limits.timeout_seconds
        failure = _collect(pipes, deadline) or _ending(process, deadline)
        output, errors = (bytes(content).decode(errors="replace") for content in pipes.values())
    if process.returncode == NO_WALL:
        require_walls(limits)
    last_line = errors.strip().rpartition("\n")[2]
    return output, f"{failure}: {last_line}" if failure and last_line else failure


def _ending(process: subprocess.Popen[bytes], deadline: float) -> str:
    """Why a process whose output is complete has failed; empty if it has not."""
    try:
        exit_code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return LATE
    return (
        f"ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}" * bool(exit_code)
    )


def missing_walls(memory_mb: int) -> dict[str, str]:
    """Try the walls in a child process; return those that do not hold on this host, with the reasons."""
    if sys.platform != "linux":
        return dict.fromkeys(WALLS, f"this is {sys.platform}, and they are Linux's")
    limits = Limits(timeout_seconds=_START_SECONDS, memory_mb=memory_mb, without=WALLS)
    with _Children(limits) as children, socket.create_server(("127.0.0.1", 0)) as server:
        file = children.enter_context(tempfile.NamedTemporaryFile(prefix="persyn-probe-"))  # noqa: SIM115
        job = {"role": "probe", "file": file.name, "port": server.getsockname()[1], "cpu_seconds": 60}
        process = children.start(job, stdout=subprocess.PIPE)
        assert process.stdout
        pipes = {process.stdout.fileno(): bytearray()}
        failure = _collect(pipes, time.monotonic() + _START_SECONDS)
        try:
            found: dict[str, str] = json.loads(bytes(*pipes.values()))
        except ValueError:
            return dict.fromkeys(WALLS, f"the sandbox's process says nothing: {failure or process.wait()}")
        return found


class _Children(ExitStack):
    """The child processes of one piece of work; leaving it ends them."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def start(self, job: dict[str, Any], *, pipes: Sequence[int] = (), **streams: Any) -> subprocess.Popen[bytes]:
        """Start a process without an environment, with Python's own library only and with these pipes."""
        job |= {"memory_mb": self._limits.memory_mb, "without": list(self._limits.without), "parent": os.getpid()}
        with _file(json.dumps(job).encode()) as file:
            command = (
                f"import sys; sys.path.append({_ROOT!r}); from persyn.llm.sandbox.child import main; "
                f"main({file.fileno()})"
            )
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", command],
                env={},
                cwd="/",
                pass_fds=(file.fileno(), *pipes),
                **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams},
            )
        self.callback(_end, process)
        return process

    def pipe(self) -> tuple[Connection, Connection]:
        """A pipe's two ends, for reading and for writing."""
        read, write = Pipe(duplex=False)
        self.callback(read.close)
        self.callback(write.close)
        return read, write


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _file(content: bytes) -> IO[bytes]:
    """A file in memory, at its beginning."""
    file = os.fdopen(os.memfd_create("persyn"), "w+b")
    file.write(content)
    file.seek(0)
    return file


def _verdicts(code: str, tests: Tests, first: int, limits: Limits, deadline: float) -> Generator[_Verdict]:
    """Start the two processes and yield what the one with the tests reports, from the test `first` on."""
    with _Children(limits) as children:
        (asked, asks), (answered, answers), (verdicts, reports) = (children.pipe() for _ in range(3))
        cpu_seconds = math.ceil(limits.timeout_seconds) * _CPU_TIMEOUTS
        job = {"role": "subject", "preamble": tests.preamble, "code": code, "cpu_seconds": cpu_seconds}
        children.start(job | {"pipes": _numbers(asked, answers)}, pipes=_numbers(asked, answers))
        job = {"role": "referee", "first": first, "cpu_seconds": cpu_seconds, **dataclasses.asdict(tests)}
        referee = children.start(
            job | {"pipes": _numbers(answered, asks), "verdicts": reports.fileno()},
            pipes=_numbers(answered, asks, reports),
        )
        for end in (asked, asks, answered, answers, reports):
            end.close()
        said: _Verdict | None = _first_word(verdicts, referee, limits)
        while said is not None:
            yield said
            try:
                said = _receive(verdicts.fileno(), min(time.monotonic() + limits.timeout_seconds, deadline))
            except TimeoutError:
                said = None
                yield _Verdict(failure=LATE)


def _numbers(*ends: Connection) -> list[int]:
    return [end.fileno() for end in ends]


def _first_word(verdicts: Connection, referee: subprocess.Popen[bytes], limits: Limits) -> _Verdict:
    """The number of tests, or why there is none; nothing of the response has run until then."""
    try:
        said = _receive(verdicts.fileno(), time.monotonic() + _START_SECONDS)
    except TimeoutError:
        raise EngineError(f"the sandbox's processes do not start within {_START_SECONDS:g} s") from None
    if said is None and referee.wait() != NO_WALL:
        return _Verdict(unreadable_tests="they end the process that reads them")
    if said is None or said.no_start:
        require_walls(limits)
        raise EngineError("the sandbox's processes end at their start")
    return said


def _receive(descriptor: int, deadline: float) -> _Verdict | None:
    """The next message of the tests' process; None at its end, or at nonsense. Raises `TimeoutError`."""
    try:
        (length,) = LENGTH.unpack(_exactly(descriptor, LENGTH.size, deadline))
        return msgspec.json.decode(_exactly(descriptor, min(length, _OUTPUT_BYTES), deadline), type=_Verdict)
    except (EOFError, msgspec.MsgspecError):
        return None


def _exactly(descriptor: int, size: int, deadline: float) -> bytes:
    content = bytearray()
    while len(content) < size:
        _await([descriptor], deadline)
        part = os.read(descriptor, size - len(content))
        if not part:
            raise EOFError
        content += part
    return bytes(content)


def _collect(pipes: dict[int, bytearray], deadline: float) -> str:
    """Read pipes until their ends; return why not to their ends, empty if so."""
    is_open = set(pipes)
    while is_open:
        try:
            ready = _await(is_open, deadline)
        except TimeoutError:
            return LATE
        for descriptor in ready:
            part = os.read(descriptor, 2**16)
            pipes[descriptor] += part
            if not part:
                is_open.remove(descriptor)
            if len(pipes[descriptor]) > _OUTPUT_BYTES:
                return f"more than {_OUTPUT_BYTES:,} bytes of output"
    return ""


def _await(descriptors: Iterable[int], deadline: float) -> list[int]:
    """The descriptors from which can be read; `TimeoutError` at the deadline."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not ready:
        raise TimeoutError
    return [descriptor for descriptor, _ in ready]


def require_walls(limits: Limits) -> None:
    """Raise `HostLacks` for a wall that does not hold on this host and may not be missing."""
    missing = missing_walls(limits.memory_mb)
    if lacking := [wall for wall in missing if wall not in limits.without]:
        raise HostLacks(describe(lacking, missing))


def describe(walls: Iterable[str], reasons: Mapping[str, str]) -> str:
    """What code could do without these walls, and how to get them."""
    parts = [f"{REMEDIES[wall][0]}, because {wall} {REMEDIES[wall][1]} ({reasons[wall]})" for wall in walls]
    return (
        f"the sandbox for code does not hold on this host: code could {'; it could '.join(parts)}; or work the run in "
        "a container or on a host that has it, or accept the risk with unsafe_without = "
        f"[{', '.join(repr(wall) for wall in walls)}] in the options"
    )
