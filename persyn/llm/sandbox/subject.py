"""Load code, and do with it what the process of the tests asks for."""

from __future__ import annotations

import builtins
import operator
import os
from collections.abc import Callable
from typing import Any

from persyn.llm.sandbox.child import run
from persyn.llm.sandbox.exchange import OPERATIONS, Channel, Gone, Peer


def work(job: dict[str, Any], missing: dict[str, str]) -> None:
    """Load `job["preamble"]` and `job["code"]`, say how each went, and serve."""
    channel = Channel(*job["pipes"])
    namespace: dict[str, Any] = {}
    kept: list[Any] = []

    def refer(value: Any) -> list[Any]:
        kept.append(value)
        return ["object", len(kept) - 1]

    def resolve(kind: str, number: int) -> Any:
        return kept[number] if kind == "object" else lambda *args, **kwargs: peer.ask("function", number, args, kwargs)

    operations = {name: getattr(operator, name, None) or getattr(builtins, name) for name in OPERATIONS}
    peer = Peer(
        channel, refer, resolve, {**operations, "call": _call, "definer": _definer, "name": namespace.__getitem__}
    )
    channel.send("started")
    for code in (job["preamble"], job["code"]):
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


def _definer(value: object, method: str) -> str | None:
    """The module whose class gives an object a special method; None if it has none but that of `object`."""
    return next((kind.__module__ for kind in type(value).__mro__[:-1] if method in vars(kind)), None)
