"""Run a custom scorer: a Python function that maps a response to a number.

    # my_scorers.py, somewhere on PYTHONPATH of every worker
    def brevity(messages, response, answer, meta):
        return -len(response.split())

    [quality]
    kind = "python"
    model = "my_scorers:brevity"

It runs in the engine host, with the worker's permissions. Changing its module's file makes a new version of
the scorer; modules that the file imports are not considered.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from persyn.errors import HostLacks, UsageError, shorten
from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Request, Result, Tick

VERSION = f"python {'.'.join(str(part) for part in sys.version_info[:3])}"
#: Responses taken at once.
_CHUNK = 64


def revision(model: str) -> str:
    """SHA-256 of the file of "module:function", without importing it; `UsageError` when there is none."""
    module, colon, function = model.partition(":")
    if not (colon and function.isidentifier()):
        raise UsageError(f"a python function is given as module:function, got {model!r}")
    origin = _origin(module)
    if origin is None or not Path(origin).is_file():
        raise UsageError(
            f"cannot find the module {module!r} of the function {function!r}; "
            "add its folder to PYTHONPATH, here and for every worker"
        )
    return f"sha256:{hashlib.sha256(Path(origin).read_bytes()).hexdigest()}"


def _origin(module: str) -> str | None:
    """A module's file. `find_spec` would import parent packages, i.e. run user code in the wrong process."""
    found, path, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        finders = sys.meta_path if part.isidentifier() else ()
        found = next((spec for finder in finders if (spec := finder.find_spec(name, path))), None)
        if found is None:
            return None
        path = found.submodule_search_locations or ()
    return found.origin if found else None


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Import the function; it answers `Judge`. It is called as function(messages, response, answer, meta).

    messages: the prompt's turns, [{"role", "content"}, ...]; answer: its reference answer or None;
    meta: the other fields of its row and, where there are any, the prompt's `tools` and the response's `tool_calls`.
    It returns a finite number, or None for no verdict; then, and if it raises, the score fails. Raises `HostLacks` when
    the function cannot be imported, or its file is not the spec's version.
    """
    options.decode(spec, options.PythonOptions)
    function = import_function(spec)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Judge)
            yield [_judge(function, request)]
            tick()

    return Batched(compute, version=VERSION, chunk=_CHUNK)


def import_function(spec: ModelSpec) -> Callable[..., Any]:
    """Import a spec's function; `HostLacks` when that fails, or its file is not the spec's version."""
    if spec.revision is not None and revision(spec.model) != spec.revision:
        raise HostLacks(
            f"the file of {spec.model!r} is not the one that the run was started with: restore it, "
            "or start a run under another name, which uses the new one"
        )
    module, _, name = spec.model.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # importing user code may raise anything
        raise HostLacks(f"cannot import {spec.model!r}: {describe_error(error)}") from error
    if not callable(function):
        raise HostLacks(f"{spec.model!r} is not a function")
    return function  # type: ignore[no-any-return]


def describe_error(error: Exception) -> str:
    """Format an exception of user code on one line."""
    return f"{type(error).__name__}: {shorten(str(error))}"


def _judge(function: Callable[..., Any], request: Judge) -> Result:
    try:
        calls = {"tool_calls": request.tool_calls} if request.tool_calls else {}
        tools = {"tools": request.tools} if request.tools else {}
        value = function(request.messages, request.response, request.answer, request.meta | tools | calls)
        if value is None:
            return Failed(request.id, "no_verdict")
        return Judged(request.id, float(value))
    except Exception as error:
        return Failed(request.id, f"scorer_error: {describe_error(error)}")
