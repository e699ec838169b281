"""The engine host: a child process that loads one model and serves it over two pipes.

A swap, a crash, an out-of-memory, a hang and a cancel are all the same to whoever holds a
`Host`: close it, start another. The host dies with its parent, however that dies.
Messages are MessagePack, each with its length in front; engines' own output goes to a log file.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from persyn.errors import AccountError, EngineError, HostLacks, OutageError, PermanentError, PersynError, UsageError
from persyn.llm import gpus
from persyn.llm.protocols import Engine, ModelSpec, Request, Result

_TICK_SECONDS = 1.0
_LOG_LINES, _LOG_BYTES = 3, 4096
#: How much more GPU memory than before may stay in use when a host has ended, and how long it is waited for.
_SLACK_MIB = 512
_FREE_SECONDS = 60.0


class Loaded(Struct, frozen=True, tag="loaded"):
    """The model is in memory."""

    version: str
    window: int


class Finished(Struct, frozen=True, tag="finished"):
    """Some requests are done; without any, the engine says that it is alive."""

    results: list[Result]


class Broken(Struct, frozen=True, tag="broken"):
    """The engine can serve nothing any more."""

    reason: str
    #: Which of `_ERRORS` the parent raises.
    kind: str = EngineError.__name__


_Up: TypeAlias = Loaded | Finished | Broken
#: What an engine's end may be, by name; anything else is an `EngineError`.
_ERRORS: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (EngineError, PermanentError, HostLacks, OutageError, AccountError)
}
_decode_up = msgspec.msgpack.Decoder(_Up).decode
_decode_requests = msgspec.msgpack.Decoder(list[Request]).decode
_encode = msgspec.msgpack.Encoder().encode


class HostDied(Exception):
    """The host ended, or said nothing for so long that it was ended; what was in flight is unknown."""


class Host:
    """A loaded model in a process of its own.

    spec:          what it loads.
    home:          the folder that relative paths in requests are in; logs are below it.
    load_seconds:  how long loading may take.
    stall_seconds: how long it may stay silent with work in hand before it counts as hung.
    devices:       CUDA_VISIBLE_DEVICES for the child; None leaves it as it is.
    is_alone:      no other engine computes on this machine's CPU meanwhile.
    """

    def __init__(
        self,
        spec: ModelSpec,
        home: Path,
        *,
        load_seconds: float = 3600.0,
        stall_seconds: float = 600.0,
        devices: str | None = None,
        is_alone: bool = False,
    ) -> None:
        self.spec = spec
        self.log = home / "logs" / f"{spec.engine}-{uuid.uuid4().hex[:12]}.log"
        self.loaded: Loaded | None = None
        self._limits = (load_seconds, stall_seconds)
        self._inbox: queue.SimpleQueue[_Up | None] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        self._broken: EngineError | None = None
        self._devices = devices.split(",") if devices else []
        self._used_mib = gpus.used_mib(self._devices) if self._devices else None
        self._child, self._down, up = _spawn(home, self.log, _environment(spec.engine, devices, is_alone=is_alone))
        # A thread reads, so that the host can always write: two full pipes would be a deadlock.
        threading.Thread(target=self._read, args=(up,), daemon=True, name="host-reader").start()
        self._send(spec)

    @property
    def pid(self) -> int:
        """The child's process id, which is also its process group's."""
        return self._child.pid

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand requests over; returns at once. Silence counts from here."""
        self._heard_at = time.monotonic()
        self._send(list(requests))

    def receive(self, timeout: float) -> list[Result]:
        """Everything finished since the last call; waits up to `timeout` seconds for the first of it.

        Raises `HostDied` when the host ended or hangs, `EngineError` when it says it is broken: an `OutageError` or
        an `AccountError` where the engine raised one.
        """
        results: list[Result] = []
        wait = timeout
        while (message := self._next(wait, has_results=bool(results))) is not None:
            if isinstance(message, Loaded):
                self.loaded = message
            elif isinstance(message, Broken):
                self._broken = _ERRORS.get(message.kind, EngineError)(message.reason)
                break
            else:
                results += message.results
            wait = 0.0
        if self._broken is not None and not results:
            raise self._broken
        return results

    def close(self) -> None:
        """End the host and everything it started; returns when it is gone, and its GPUs' memory with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._down.close()
        # A driver frees memory some time after the process has ended; the next model would not fit beside it.
        if self._used_mib is not None:
            gpus.await_free(self._devices, self._used_mib + _SLACK_MIB, _FREE_SECONDS)

    def _next(self, wait: float, *, has_results: bool) -> _Up | None:
        """The next message, if there is one; an end is told only when there are no results that it would take along."""
        try:
            message = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
        except queue.Empty:
            self._require_alive()
            return None
        if message is None:
            self._inbox.put(None)  # whoever asks again is told again
            if has_results:
                return None
            raise HostDied(f"{self._ending()}; {self._last_words()}")
        self._heard_at = time.monotonic()
        return message

    def _require_alive(self) -> None:
        limit = self._limits[0 if self.loaded is None else 1]
        silent = time.monotonic() - self._heard_at
        if silent > limit:
            doing = "while loading" if self.loaded is None else "with requests in hand"
            raise HostDied(f"the engine said nothing for {silent:.0f} s {doing}; {self._last_words()}")

    def _ending(self) -> str:
        code = self._child.wait()
        return f"the engine was ended by {signal.Signals(-code).name}" if code < 0 else f"the engine exited with {code}"

    def _last_words(self) -> str:
        text = _end_of(self.log).decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
        lines = text.strip().splitlines()[-_LOG_LINES:]
        return f"log {self.log}" + (f" ends: {' | '.join(lines)}" if lines else " is empty")

    def _send(self, value: ModelSpec | list[Request]) -> None:
        # A host that is gone is noticed by the reader, with the reason.
        with contextlib.suppress(OSError):
            self._down.send_bytes(_encode(value))

    def _read(self, up: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._inbox.put(_decode_up(up.recv_bytes()))
        up.close()
        self._inbox.put(None)


def ask(
    spec: ModelSpec, requests: Sequence[Request], home: Path, *, load_seconds: float, stall_seconds: float
) -> list[Result]:
    """Load a model, have it answer some requests with distinct ids, and end it; results in the order of the requests.

    The arguments are those of `Host`. Raises `HostDied`, and `EngineError` when the engine cannot serve.
    """
    host = Host(spec, home, load_seconds=load_seconds, stall_seconds=stall_seconds, is_alone=True)
    found: dict[int, Result] = {}
    try:
        host.submit(requests)
        while len(found) < len(requests):
            found.update((result.id, result) for result in host.receive(timeout=1.0))
    finally:
        host.close()
    return [found[request.id] for request in requests]


def _end_of(file: Path) -> bytes:
    """The last of a file that may be large, or not there."""
    if not file.exists():
        return b""
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - _LOG_BYTES))
        return log.read()


def _environment(engine: str, devices: str | None, *, is_alone: bool) -> dict[str, str]:
    """This process's environment, with what the child's threads do while they wait for each other.

    Threads that spin take the cores from another engine's: two on one CPU were four times as slow as
    with threads that sleep. An engine alone is some 8% slower with threads that sleep. A student's rows are
    tokenised on all cores: a GPU waits for them. Elsewhere nothing is gained, and a process forked later would hang.
    """
    waiting = {} if is_alone else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    pinned = {} if devices is None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": devices}
    # The child works in another folder: what is meant relative to this one has to be said in full.
    path = os.pathsep.join(os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part)
    own = {"TOKENIZERS_PARALLELISM": "true" if engine == "log_likelihood" else "false"}
    return {**waiting, **os.environ, **own, **({"PYTHONPATH": path} if path else {}), **pinned}


def _spawn(
    home: Path, log: Path, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Connection, Connection]:
    """Start the child with one pipe to it and one from it, in its own session."""
    log.parent.mkdir(parents=True, exist_ok=True)
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    try:
        with log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "persyn.llm.host", str(down_read), str(up_write)],
                cwd=home,
                pass_fds=(down_read, up_write),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
            )
    except BaseException:
        os.close(down_write)
        os.close(up_read)
        raise
    finally:
        os.close(down_read)
        os.close(up_write)
    return child, Connection(down_write, readable=False), Connection(up_read, writable=False)


class _Server:
    """The child's side: one engine, fed and emptied until the parent is gone."""

    def __init__(self, down: Connection, up: Connection) -> None:
        self._down = down
        self._up = up
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._said_at = 0.0

    def run(self) -> None:
        """Load what the first message names, then serve."""
        from persyn.llm import engines

        spec = msgspec.msgpack.decode(self._down.recv_bytes(), type=ModelSpec)
        threading.Thread(target=self._read, daemon=True, name="reader").start()
        try:
            engine = engines.load(spec, self.tick)
            self._say(Loaded(engine.version, engine.window))
            while True:
                self._serve(engine)
        except UsageError as error:  # what was asked for is not there, or not what it was
            self._end(PermanentError(str(error)))
        except PersynError as error:
            self._end(error)
        except ModuleNotFoundError as error:
            self._end(HostLacks(f"{spec.engine} needs the package {error.name!r}, which is not installed here"))

    def _end(self, error: PersynError) -> None:
        self._say(Broken(str(error).replace("\0", "\N{REPLACEMENT CHARACTER}"), type(error).__name__))

    def tick(self) -> None:
        """Tell the parent that a long step is alive."""
        if time.monotonic() - self._said_at > _TICK_SECONDS:
            self._say(Finished([]))

    def _serve(self, engine: Engine) -> None:
        wait = not engine.pending
        while wait or not self._inbox.empty():
            engine.submit(_decode_requests(self._inbox.get()))
            wait = False
        results = engine.step()
        if results:
            self._say(Finished(results))
        else:
            self.tick()

    def _say(self, message: _Up) -> None:
        self._said_at = time.monotonic()
        self._up.send_bytes(_encode(message))

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._inbox.put(self._down.recv_bytes())
        # The parent is gone or wants the end: take along whatever the engine has started.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _main() -> None:
    down, up = (int(argument) for argument in sys.argv[1:3])
    _Server(Connection(down, writable=False), Connection(up, readable=False)).run()


if __name__ == "__main__":
    _main()
