"""Teachers behind a server that PerSyn starts: any program with an OpenAI-compatible chat completions API.

The engine host starts the command on a free port of the loopback interface, waits until it is healthy, sends it
requests as the engine `openai` does, and ends it with everything that it started. Its output goes to the host's log.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from persyn.errors import EngineError, OutageError, shorten
from persyn.llm import loading, options
from persyn.llm.protocols import Engine, ModelSpec, Request, Result, Tick
from persyn.llm.teachers import chat_server, supervisor

_HOST = "127.0.0.1"
_LOOK_SECONDS, _ANSWER_SECONDS = 0.2, 5.0
#: How long a supervisor may take to end what a server has left behind, after which it ends itself.
_END_SECONDS = 2.0
#: How much of the server's last output an error repeats.
_TAIL_BYTES, _TAIL_CHARACTERS = 4096, 500
#: Where servers say that they are ready, in the order of trying.
_HEALTH = ("/health", "/v1/models")


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Start the server and wait until it is healthy; `EngineError` if it ends before, or takes too long.

    Options: `options.ServerOptions`.
    """
    chosen = options.decode(spec, options.ServerOptions)
    port = _free_port()
    server = Server(spec, chosen, port)
    server.wait(chosen, tick)
    # Proxies are for other hosts; the server itself, which may download a model, has been given them already.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    shared = {name: getattr(chosen, name) for name in options.ChatOptions.__struct_fields__}
    client = {**shared, "base_url": f"http://{_HOST}:{port}/v1"}
    inner = chat_server.load(ModelSpec("openai", spec.model, options=client), tick)
    return StartedServerEngine(inner, server)


class StartedServerEngine:
    """Passes requests to a client of the server, and ends with the server."""

    def __init__(self, inner: Engine, server: Server) -> None:
        self.inner = inner
        self.version = f"server {server.program}"
        self.window = inner.window
        self._server = server

    @property
    def pending(self) -> int:
        """The number of submitted and unfinished requests."""
        return self.inner.pending

    def submit(self, requests: Sequence[Request]) -> None:
        """Pass requests on."""
        self.inner.submit(requests)

    def step(self) -> list[Result]:
        """Serve for a moment; `EngineError` once the server has ended, or answers nothing any more."""
        self._server.require_running()
        try:
            return self.inner.step()
        except OutageError as error:  # nobody else will restart it
            self._server.require_running(within=_END_SECONDS)
            raise EngineError(f"the server is running but does not answer: {error}") from error


class Server:
    """A running command under a supervisor, which ends it when this process ends."""

    def __init__(self, spec: ModelSpec, chosen: options.ServerOptions, port: int) -> None:
        loading.require_program(chosen.command[0])
        self.program = Path(chosen.command[0]).name
        self._url = f"http://{_HOST}:{port}"
        values = {"model": spec.model, "revision": spec.revision or "", "host": _HOST, "port": port, "gpus": spec.gpus}
        command = [_filled(word, values) for word in chosen.command]
        added = {name: _filled(value, values) for name, value in chosen.env.items()}
        read_end, self._lifeline = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, str(read_end), *command],
            env=os.environ | added,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(read_end,),
            start_new_session=True,  # it outlives the host for a moment, to end the server
        )
        os.close(read_end)
        self._tail = b""
        self._reader = threading.Thread(target=self._read, daemon=True, name="server-output")
        self._reader.start()

    def wait(self, chosen: options.ServerOptions, tick: Tick) -> None:
        """Wait until the server is healthy."""
        paths = (chosen.health,) if chosen.health else _HEALTH
        until = time.monotonic() + chosen.start_seconds
        while not any(_is_healthy(self._url + path) for path in paths):
            self.require_running()
            if time.monotonic() > until:
                raise EngineError(
                    f"{self.program} was not healthy at {' or '.join(paths)} after {chosen.start_seconds:g} s; raise "
                    f"options.start_seconds, or correct options.command{self._last_words()}"
                )
            tick()
            time.sleep(_LOOK_SECONDS)
        self.require_running()  # or another program answered at its port

    def require_running(self, *, within: float = 0.0) -> None:
        """Raise `EngineError` if the server has ended, or ends within so many seconds."""
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            return
        self._reader.join(_LOOK_SECONDS)
        how = f"was ended by {signal.Signals(code - 128).name}" if code > 128 else f"ended with exit code {code}"
        raise EngineError(f"{self.program} {how}{self._last_words()}")

    def _last_words(self) -> str:
        said = shorten(self._tail.decode(errors="replace")[-_TAIL_CHARACTERS:], most=_TAIL_CHARACTERS)
        return f"; its output ends: {said}" if said else "; it wrote no output"

    def _read(self) -> None:
        assert self._process.stdout is not None
        while part := os.read(self._process.stdout.fileno(), _TAIL_BYTES):
            self._tail = (self._tail + part)[-_TAIL_BYTES:]
            sys.stderr.buffer.write(part)
            sys.stderr.buffer.flush()


def _filled(text: str, values: Mapping[str, object]) -> str:
    """Replace the placeholders; other braces, as in JSON, stay."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as found:
        return int(found.getsockname()[1])


def _is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # `URLError` is an `OSError`
        return False
