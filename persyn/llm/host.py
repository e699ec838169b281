"""The engine host: a child process that loads one model and serves it over two pipes.

A model swap, a crash, an out-of-memory error, a hang and a cancellation are all handled alike by the owner of a
`Host`: close it and start another. The host dies with its parent, however the parent dies.
Messages are length-prefixed MessagePack; the engines' own output goes to a log file.
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
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import Engine, ModelSpec, Request, Result

_TICK_SECONDS = 1.0
_LOG_LINES, _LOG_BYTES = 3, 4096
#: GPU memory that may remain in use after a host has ended, beyond what was used before, and how long to wait for it.
_SLACK_MIB = 512
_FREE_SECONDS = 60.0


class Loaded(Struct, frozen=True, tag="loaded"):
    """The model is in memory."""

    version: str
    window: int


class Finished(Struct, frozen=True, tag="finished"):
    """Some requests are finished; an empty list is a sign of life."""

    results: list[Result]


class EngineBroken(Struct, frozen=True, tag="broken"):
    """The engine can no longer serve anything."""

    reason: str
    #: Which of `_ERRORS` the parent raises.
    kind: str = EngineError.__name__
    #: As in an `EngineError`.
    may_be_charged: int = 0


_Up: TypeAlias = Loaded | Finished | EngineBroken
#: The errors that a host reports by name; any other name becomes an `EngineError`.
_ERRORS: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (EngineError, PermanentError, HostLacks, OutageError, AccountError)
}
_decode_up = msgspec.msgpack.Decoder(_Up).decode
_decode_requests = msgspec.msgpack.Decoder(list[Request]).decode
_encode = msgspec.msgpack.Encoder().encode


class HostDied(Exception):
    """The host ended, or was killed after a long silence; the state of its unfinished requests is unknown."""


class Host:
    """A loaded model in its own process.

    spec:          what it loads.
    home:          the folder for relative paths in requests; logs are below it.
    load_seconds:  how long loading may take.
    stall_seconds: how long it may be silent with unfinished requests before it counts as hung.
    devices:       CUDA_VISIBLE_DEVICES for the child; None leaves it as it is.
    is_alone:      no other engine computes on this machine's CPU at the same time.
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
        # A separate reader thread keeps the host's writes from blocking: two full pipes would deadlock.
        threading.Thread(target=self._read, args=(up,), daemon=True, name="host-reader").start()
        self._send(spec)

    @property
    def pid(self) -> int:
        """The child's process id, which is also its process group's."""
        return self._child.pid

    def submit(self, requests: Sequence[Request]) -> None:
        """Send requests and return at once. The stall timeout starts here."""
        self._heard_at = time.monotonic()
        self._send(list(requests))

    def receive(self, timeout: float) -> list[Result]:
        """Return everything finished since the last call; wait up to `timeout` seconds for the first result.

        Raises `HostDied` when the host ended or hangs, `EngineError` when it reports a failure: an `OutageError` or
        an `AccountError` if the engine raised one.
        """
        results: list[Result] = []
        wait = timeout
        while (message := self._next(wait, has_results=bool(results))) is not None:
            if isinstance(message, Loaded):
                self.loaded = message
            elif isinstance(message, EngineBroken):
                self._broken = _ERRORS.get(message.kind, EngineError)(message.reason)
                self._broken.may_be_charged = message.may_be_charged
                break
            else:
                results += message.results
            wait = 0.0
        if self._broken is not None and not results:
            raise self._broken
        return results

    def close(self) -> None:
        """Kill the host and everything it started; returns when it is gone and its GPU memory is free."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._down.close()
        # A driver frees memory a while after the process has ended; until then the next model would not fit.
        if self._used_mib is not None:
            gpus.await_free(self._devices, self._used_mib + _SLACK_MIB, _FREE_SECONDS)

    def _next(self, wait: float, *, has_results: bool) -> _Up | None:
        """The next message, if there is one; EOF is reported only after pending results have been returned."""
        try:
            message = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
        except queue.Empty:
            self._require_alive()
            return None
        if message is None:
            self._inbox.put(None)  # keep EOF in the queue for later calls
            if has_results:
                return None
            raise HostDied(f"{self._ending()}; {self._last_words()}")
        self._heard_at = time.monotonic()
        return message

    def _require_alive(self) -> None:
        limit = self._limits[0 if self.loaded is None else 1]
        silent = time.monotonic() - self._heard_at
        if silent > limit:
            doing = "while loading" if self.loaded is None else "with requests in flight"
            raise HostDied(f"the engine was silent for {silent:.0f} s {doing}; {self._last_words()}")

    def _ending(self) -> str:
        code = self._child.wait()
        return f"the engine died of {signal.Signals(-code).name}" if code < 0 else f"the engine exited with {code}"

    def _last_words(self) -> str:
        text = _end_of(self.log).decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
        lines = text.strip().splitlines()[-_LOG_LINES:]
        return f"log {self.log}" + (f" ends: {' | '.join(lines)}" if lines else " is empty")

    def _send(self, value: ModelSpec | list[Request]) -> None:
        # The reader notices that a host is gone, and knows why.
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
    """The last part of a file that may be large or missing."""
    if not file.exists():
        return b""
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - _LOG_BYTES))
        return log.read()


def _environment(engine: str, devices: str | None, *, is_alone: bool) -> dict[str, str]:
    """This process's environment, with settings for the child's thread pools.

    Spinning threads take cores away from another engine: on one CPU, two engines with spinning threads were four
    times as slow as with sleeping ones. An engine alone is about 8% slower with sleeping threads. A student's rows are
    tokenised on all cores because its GPU waits for them; other engines gain nothing, and a later fork would hang.
    """
    waiting = {} if is_alone else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    pinned = {} if devices is None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": devices}
    # The child has another working directory, so relative paths must become absolute.
    path = os.pathsep.join(os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part)
    own = {"TOKENIZERS_PARALLELISM": "true" if ENGINES[engine].tokenises_in_parallel else "false"}
    return {**waiting, **os.environ, **own, **({"PYTHONPATH": path} if path else {}), **pinned}


def _spawn(
    home: Path, log: Path, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Connection, Connection]:
    """Start the child in its own session, with one pipe in each direction."""
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
    """The child's side: runs one engine until the parent is gone."""

    def __init__(self, down: Connection, up: Connection) -> None:
        self._down = down
        self._up = up
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._said_at = 0.0

    def run(self) -> None:
        """Load the model named in the first message, then serve requests."""
        from persyn.llm import engines

        spec = msgspec.msgpack.decode(self._down.recv_bytes(), type=ModelSpec)
        threading.Thread(target=self._read, daemon=True, name="reader").start()
        try:
            engine = engines.load(spec, self.tick)
            self._say(Loaded(engine.version, engine.window))
            while True:
                self._serve(engine)
        except UsageError as error:  # something in the request is missing, or has changed
            self._end(PermanentError(str(error)))
        except PersynError as error:
            self._end(error)
        except ModuleNotFoundError as error:
            self._end(HostLacks(f"{spec.engine} needs the package {error.name!r}, which is not installed here"))

    def _end(self, error: PersynError) -> None:
        reason, charged = str(error).replace("\0", "\N{REPLACEMENT CHARACTER}"), getattr(error, "may_be_charged", 0)
        self._say(EngineBroken(reason, type(error).__name__, charged))

    def tick(self) -> None:
        """Tell the parent that a long step is still making progress."""
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
        # The parent is gone or closed the host: kill everything the engine has started, too.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _main() -> None:
    down, up = (int(argument) for argument in sys.argv[1:3])
    _Server(Connection(down, writable=False), Connection(up, readable=False)).run()


if __name__ == "__main__":
    _main()
