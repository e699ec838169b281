"""Try what untrusted code must not be able to do, behind the same walls."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any


def work(job: dict[str, Any], missing: dict[str, str]) -> None:
    """Print, as JSON, the walls that do not hold with the reasons.

    job:     `file`, which exists and is not to be read or changed; `port`, on which this host listens; `memory_mb`.
    missing: walls that could not be put up.
    """
    found = dict(missing)
    for wall, attempts in _attempts(job).items():
        for what, attempt in attempts.items() if wall not in missing else ():
            with contextlib.suppress(OSError, MemoryError):
                attempt()
                found.setdefault(wall, f"{what} is possible")
    sys.stdout.write(json.dumps(found))


def _attempts(job: dict[str, Any]) -> dict[str, dict[str, Callable[[], Any]]]:
    file = job["file"]
    return {
        "limits": {"more memory than allowed": lambda: bytearray(job["memory_mb"] * 2**20)},
        "landlock": {
            "reading a file": lambda: os.close(os.open(file, os.O_RDONLY)),
            "listing a folder": lambda: os.listdir(os.path.dirname(file)),
            "reading about processes": lambda: os.close(os.open("/proc/self/environ", os.O_RDONLY)),
        },
        "seccomp": {
            "a connection": lambda: socket.create_connection(("127.0.0.1", job["port"]), timeout=1),
            "a socket": socket.socket,
            "another process": _fork,
            "a signal to the parent": lambda: os.kill(os.getppid(), 0),
            "writing a file": lambda: os.close(os.open(file, os.O_WRONLY)),
            "creating a file": lambda: os.close(os.open(f"{file}.new", os.O_WRONLY | os.O_CREAT)),
            "creating a folder": lambda: os.mkdir(f"{file}.folder"),
            "a symbolic link": lambda: os.symlink(file, f"{file}.link"),
            "changing permissions": lambda: os.chmod(file, 0o700),
            "changing times": lambda: os.utime(file),
            "removing a file": lambda: os.unlink(file),
        },
    }


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
