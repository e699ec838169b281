"""A minimal chat-completions server: it waits, gives the same answer to every prompt, and records requests.

python -m benchmarks.stub MEAN_SECONDS

Latencies are exponential with that mean, drawn from a seed in order of arrival; 0 answers immediately. The first
line of output is the port. GET returns `Asked` as JSON. The server exits when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import Struct

_SEED = 0


class Asked(Struct):
    """The requests of a server in order of arrival."""

    #: Seconds since the epoch.
    at: list[float]
    #: The delay of each answer, in seconds.
    latency: list[float]
    #: The number of the request's content: equal contents have the same number.
    which: list[int]


def _answer() -> bytes:
    message = {"role": "assistant", "content": "A short answer. " * 8}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 50, "completion_tokens": 32}
    return _response(msgspec.json.encode({"object": "chat.completion", "choices": [choice], "usage": usage}))


def _response(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


_ANSWER = _answer()


class _Connection(asyncio.Protocol):
    """Sequential requests, as sent by a client that waits for each answer."""

    def __init__(self, asked: Asked, mean_seconds: float) -> None:
        self._asked = asked
        self._mean_seconds = mean_seconds
        self._random = random.Random(_SEED)
        self._received = b""

    def __call__(self) -> _Connection:
        connection = _Connection(self._asked, self._mean_seconds)
        connection._random = self._random  # one sequence for all connections
        return connection

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
            self._transport.write(_response(msgspec.json.encode(self._asked)))
        elif len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self._received = b""
            self._take(body)

    def _take(self, body: bytes) -> None:
        latency = self._random.expovariate(1 / self._mean_seconds) if self._mean_seconds else 0.0
        self._asked.at.append(time.time())
        self._asked.latency.append(latency)
        self._asked.which.append(hash(body))
        if latency:
            asyncio.get_running_loop().call_later(latency, self._transport.write, _ANSWER)
        else:
            self._transport.write(_ANSWER)


@contextmanager
def serving(mean_seconds: float) -> Iterator[int]:
    """Run a stub in its own process; yields its port."""
    command = [sys.executable, "-m", "benchmarks.stub", str(mean_seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


def asked(port: int) -> Asked:
    """The requests that the stub on a port has received so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
        return msgspec.json.decode(response.read(), type=Asked)


async def _serve(mean_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection(Asked([], [], []), mean_seconds), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
