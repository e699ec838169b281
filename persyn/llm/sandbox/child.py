"""A child process of the sandbox, which does the job that a file descriptor has as JSON.

It puts up its walls before it runs anything of the job. `program` runs code as a script; `subject` loads code and does
with it what the referee asks for; `referee` runs the tests and reports each outcome; `probe` tries the walls.
Imports nothing but the standard library, from which alone the code can import.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

from persyn.llm.sandbox import probe, referee, walls
from persyn.llm.sandbox.exchange import Channel, Gone, Peer


def main(descriptor: int) -> None:
    """Do the job in the file of this descriptor, behind walls."""
    with os.fdopen(descriptor) as file:
        job = json.load(file)
    sys.argv[:] = [""]
    sys.set_int_max_str_digits(0)
    os.environ.clear()
    try:
        missing = walls.enclose(job["memory_mb"], job["cpu_seconds"], without=job["without"])
    except walls.NoWall as error:
        sys.stderr.write(str(error))
        sys.exit(walls.NO_WALL)
    roles: dict[str, Callable[[], None]] = {
        "program": lambda: run(job["code"], "__main__", {}),
        "subject": lambda: _serve(job["code"], Channel(*job["pipes"])),
        "referee": lambda: referee.judge(job, Channel(*job["pipes"]), Channel(-1, job["verdicts"])),
        "probe": lambda: probe.report(job["probe"], missing),
    }
    roles[job["role"]]()


def run(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute code as a module of this name in a namespace."""
    namespace |= {"__name__": name, "__builtins__": builtins}
    exec(compile(code, "response.py", "exec", dont_inherit=True), namespace)  # noqa: S102 - behind walls


def _serve(code: str, channel: Channel) -> None:
    """Load the code, say how that went, and do with it what is asked for."""
    namespace: dict[str, Any] = {}
    kept: list[Any] = []

    def refer(value: Any) -> list[Any]:
        kept.append(value)
        return ["object", len(kept) - 1]

    def resolve(kind: str, number: int) -> Any:
        return kept[number] if kind == "object" else lambda *args, **kwargs: peer.ask("function", number, args, kwargs)

    operations = {name: getattr(operator, name, None) or getattr(builtins, name) for name in referee.OPERATIONS}
    peer = Peer(channel, refer, resolve, {**operations, "call": _call, "name": namespace.__getitem__})
    channel.send("started")
    try:
        run(code, "response", namespace)
    except Exception as error:
        channel.send(f"{type(error).__name__}: {error}")
        return
    channel.send("")
    try:
        peer.serve()
    except Gone:
        os._exit(0)


def _call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
