"""A quality measure of your own: any Python function that gives a response a number.

    # my_scorers.py, somewhere on PYTHONPATH of every worker
    def brevity(messages, response, answer, meta):
        return -len(response.split())

    [quality]
    kind = "python"
    model = "my_scorers:brevity"

It runs in the engine host: what it does there, it does with the worker's rights. The scorer is another
version when its module's file changes; what that file imports is not looked at.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msgspec import Struct

from persyn.errors import EngineError, UsageError, shorten
from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Request, Result, Tick

#: Responses handed over at once.
_CHUNK = 64


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """A function of your own takes none; what it needs it finds in its module."""


def revision(model: str) -> str:
    """SHA-256 of the file of "module:function", which is not imported; `UsageError` when there is none."""
    module, colon, function = model.partition(":")
    if not (colon and function.isidentifier()):
        raise UsageError(f"a python scorer's model is module:function, got {model!r}")
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise UsageError(f"there is no module {module!r} to take {function!r} from; is its folder on PYTHONPATH?")
    return f"sha256:{hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()}"


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Import the function; it answers `Judge`. It is called as function(messages, response, answer, meta).

    messages: the prompt's turns, [{"role", "content"}, ...]; answer: its reference answer or None;
    meta: what else its row said. Returns a finite number, or None for no verdict: the score has failed then, as it
    has when the function raises. Raises `EngineError` when it cannot be imported, or its file is not the one the spec
    means.
    """
    options.decode(spec, Options)
    if spec.revision is not None and revision(spec.model) != spec.revision:
        raise EngineError(
            f"the file of {spec.model!r} is not the one the run was started with: put that back, "
            "or start a run of another name, which is scored by the new one"
        )
    function = _function(spec.model)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Judge)
            yield [_judge(function, request)]
            tick()

    version = ".".join(str(part) for part in sys.version_info[:3])
    return Batched(compute, version=f"python {version}", chunk=_CHUNK)


def _function(model: str) -> Callable[..., Any]:
    module, _, name = model.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # a module of somebody else's may raise anything
        raise EngineError(f"cannot import {model!r}: {type(error).__name__}: {shorten(str(error))}") from error
    if not callable(function):
        raise EngineError(f"{model!r} is no function")
    return function  # type: ignore[no-any-return]


def _judge(function: Callable[..., Any], request: Judge) -> Result:
    try:
        value = function(request.messages, request.response, request.answer, request.meta)
        if value is None:
            return Failed(request.id, "no_verdict")
        return Judged(request.id, float(value))
    except Exception as error:
        return Failed(request.id, f"scorer_error: {type(error).__name__}: {shorten(str(error))}")
