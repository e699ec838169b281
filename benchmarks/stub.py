"""A minimal chat-completions server: it waits, gives the same answer to every prompt, and records requests.

python -m benchmarks.stub '{"mean_seconds": 0.2}'

The argument is a `Behaviour`. The first line of output is the port. GET returns `Asked` as JSON. The server exits when
its standard input is closed.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import Struct

_SEED = 0


class Behaviour(Struct, frozen=True):
    """How a server answers."""

    #: Mean of the exponential latencies, drawn from a seed in order of arrival; 0 answers immediately.
    mean_seconds: float = 0.0
    #: Every latency is the mean.
    is_constant: bool = False
    #: Requests that are computed at a time, while others queue; 0: all.
    slots: int = 0
    #: With this many requests in flight, each takes twice as long as alone, as on a server that batches; 0: never.
    doubles_at: int = 0
    #: Requests beyond this rate are answered with HTTP 429; 0: none.
    per_second: float = 0.0
    #: 0: any free port.
    port: int = 0


class Asked(Struct):
    """The requests of a server in order of arrival."""

    #: Seconds since the epoch.
    at: list[float]
    #: The delay of each answer, in seconds.
    latency: list[float]
    #: The number of the request's content: equal contents have the same number.
    which: list[int]
    #: How many were answered with HTTP 429; they are not counted in the lists.
    rejected: int = 0


def _answer() -> bytes:
    message = {"role": "assistant", "content": "A short answer. " * 8}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 50, "completion_tokens": 32}
    return _response(msgspec.json.encode({"object": "chat.completion", "choices": [choice], "usage": usage}))


def _response(body: bytes, status: bytes = b"200 OK") -> bytes:
    return (
        b"HTTP/1.1 "
        + status
        + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


_ANSWER = _answer()
_TOO_MANY = _response(b'{"error": {"message": "too many requests"}}', b"429 Too Many Requests")


class _Server:
    """What all connections of a server share."""

    def __init__(self, how: Behaviour) -> None:
        self.how = how
        self.asked = Asked([], [], [])
        self.random = random.Random(_SEED)
        self.in_flight = 0
        self._queue: deque[Callable[[], object]] = deque()
        #: Requests that the limit allows now, at most those of a second, and the time of that number.
        self._allowed, self._allowed_at = how.per_second, time.monotonic()

    def allows(self) -> bool:
        """Whether the limit allows another request."""
        if not self.how.per_second:
            return True
        at = time.monotonic()
        self._allowed = min(self.how.per_second, self._allowed + (at - self._allowed_at) * self.how.per_second)
        self._allowed_at = at
        if self._allowed < 1:
            self.asked.rejected += 1
            return False
        self._allowed -= 1
        return True

    def answer(self, send: Callable[[], object], which: int) -> None:
        """Call `send` when the answer is computed."""
        how = self.how
        self.asked.at.append(time.time())
        self.asked.which.append(which)
        latency = how.mean_seconds
        if latency and not how.is_constant:
            latency = self.random.expovariate(1 / latency)
        if how.doubles_at:
            latency *= 1 + self.in_flight / how.doubles_at
        self.asked.latency.append(latency)

        def end() -> None:
            self.in_flight -= 1
            send()
            if self._queue:
                self._queue.popleft()()

        def begin() -> None:
            self.in_flight += 1
            asyncio.get_running_loop().call_later(latency, end)

        if not latency:
            send()
        elif how.slots and self.in_flight >= how.slots:
            self._queue.append(begin)
        else:
            begin()


class _Connection(asyncio.Protocol):
    """Sequential requests, as sent by a client that waits for each answer."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        if head.startswith(b"GET"):
            self._received = b""
            self._transport.write(_response(msgspec.json.encode(self._server.asked)))
        elif len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self._received = b""
            if self._server.allows():
                self._server.answer(lambda: self._transport.write(_ANSWER), hash(body))
            else:
                self._transport.write(_TOO_MANY)


@contextmanager
def serving(mean_seconds: float, **how: Any) -> Iterator[int]:
    """Run a stub in its own process, killed at the end of the block; yields its port."""
    behaviour = msgspec.json.encode(Behaviour(mean_seconds, **how)).decode()
    command = [sys.executable, "-m", "benchmarks.stub", behaviour]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def asked(port: int) -> Asked:
    """The requests that the stub on a port has received so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
        return msgspec.json.decode(response.read(), type=Asked)


async def _serve(how: Behaviour) -> None:
    loop = asyncio.get_running_loop()
    shared = _Server(how)
    server = await loop.create_server(lambda: _Connection(shared), "127.0.0.1", how.port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


if __name__ == "__main__":
    asyncio.run(_serve(msgspec.json.decode(sys.argv[1], type=Behaviour)))
