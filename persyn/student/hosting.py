"""Run one model in a host of its own, and send it requests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from persyn.errors import EngineError
from persyn.llm.host import Host, HostDied
from persyn.llm.protocols import ModelSpec, Request, Result
from persyn.settings import Settings


def served(host: Host, asked: Sequence[Request]) -> Iterator[list[Result]]:
    """Yield results as they arrive, keeping the engine's window full."""
    left = iter(asked)
    n_open = 0
    while True:
        window = host.loaded.window if host.loaded else 0
        if more := list(islice(left, window - n_open)):
            host.submit(more)
            n_open += len(more)
        elif window and not n_open:
            return
        if results := host.receive(timeout=1.0):
            n_open -= len(results)
            yield results


@contextmanager
def hosted(spec: ModelSpec, settings: Settings) -> Iterator[Host]:
    """A model in a host of its own, which ends with the block; raise `EngineError` when it dies."""
    host = Host(
        spec,
        settings.home,
        load_seconds=settings.load_seconds,
        stall_seconds=settings.stall_seconds,
        # Devices are named, so that one model's memory is released before the next model is loaded.
        devices=_devices(spec.gpus),
        is_alone=True,
    )
    try:
        yield host
    except HostDied as death:
        raise EngineError(f"{death}; finished responses are stored; repeat the command to continue") from death
    finally:
        host.close()


def _devices(n: int) -> str | None:
    """The first GPUs visible to this process."""
    if not n:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(visible.split(",")[:n] if visible else map(str, range(n)))
