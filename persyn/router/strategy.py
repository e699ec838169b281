"""Run a custom strategy: a Python function that scores the teachers for prompts, in the router's place.

    # my_strategies.py, somewhere on PYTHONPATH of every worker
    def by_length(prompts, known, most=200):
        is_long = [len(prompt["messages"][-1]["content"]) > most for prompt in prompts]
        return np.outer(np.where(is_long, 1, -1), known.sizes)

    [strategy]
    kind = "python"
    model = "my_strategies:by_length"
    options = { most = 400 }

Like a custom scorer, it runs in the engine host, and changing its module's file makes a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, ModelSpec, Request, Result, Route, Routed, Tick
from persyn.llm.scorers import custom_function
from persyn.method.strategies import StrategyInputs

#: Maximum number of prompts passed at once.
_CHUNK = 256


def pack(known: StrategyInputs) -> dict[str, Any]:
    """Convert a strategy's inputs to plain values for another process; equal inputs give equal values."""
    packed: dict[str, Any] = msgspec.to_builtins(
        known, builtin_types=(bytes,), enc_hook=lambda array: [list(array.shape), array.tobytes()]
    )
    return packed


def unpack(packed: dict[str, Any]) -> StrategyInputs:
    """Restore packed inputs; their arrays are read-only."""
    return msgspec.convert(packed, StrategyInputs, dec_hook=_array)


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Import the function; it answers `Route`. It is called as function(prompts, known, **options).

    prompts: {"messages", "meta"} of each prompt of an arbitrary batch.
    known:   `persyn.method.strategies.StrategyInputs` of the run.
    returns: (P, T) finite scores of the T teachers, in head order.
    Prompts for which it raises, or returns anything else, fail. Raises `EngineError` as
    `custom_function.import_function` does.
    """
    chosen = options.decode(spec, options.StrategyOptions)
    known, function = unpack(chosen.known), custom_function.import_function(spec)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        routes = [request for request in requests if isinstance(request, Route)]
        return _ask(lambda prompts: function(prompts, known, **chosen.options), routes, len(known.teachers), tick)

    return Batched(compute, version=custom_function.VERSION, chunk=_CHUNK)


def _ask(
    function: Callable[[list[Any]], Any], routes: list[Route], n_teachers: int, tick: Tick
) -> Iterator[list[Result]]:
    """Score all prompts at once; if that fails, score them one by one so that only the faulty ones fail."""
    tick()
    failure = ""
    try:
        found = function([{"messages": route.messages, "meta": route.meta} for route in routes])
        scores = _checked(found, (len(routes), n_teachers)).tolist()
    except Exception as error:  # user code may raise anything
        failure = f"strategy_error: {custom_function.describe_error(error)}"
    if not failure:
        yield [Routed(route.id, row) for route, row in zip(routes, scores, strict=True)]
    elif len(routes) == 1:
        yield [Failed(routes[0].id, failure)]
    else:
        for route in routes:
            yield from _ask(function, [route], n_teachers, tick)


def _checked(found: Any, shape: tuple[int, int]) -> NDArray[np.float64]:
    scores = np.asarray(found, dtype=np.float64)
    if scores.shape != shape:
        raise ValueError(f"it must return scores of shape {shape}, a row for each prompt, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"every score must be a finite number, got {scores[~np.isfinite(scores)][0]}")
    return scores


def _array(kind: type, packed: Any) -> NDArray[np.float64]:
    shape, values = packed
    return np.frombuffer(values, dtype=np.float64).reshape(shape)
